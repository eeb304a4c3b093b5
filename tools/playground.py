"""See what a model thinks: a page for one person's browser.

    python playground.py --out_dir=out/phase1_char --out_dir=out/phase2_bpe

It shows the text that a model writes and what each token was drawn from; which token looks at which;
the same prompt through several checkpoints; and the loss of a run while it trains. The page is served to
this machine alone and fetches nothing from another.
"""

import sys
from dataclasses import dataclass

from configurator import UserError, configure, run


@dataclass(frozen=True)
class PlaygroundConfig:
    """Serve a page, to this machine alone, that shows what the models of one or more runs think."""

    out_dir: str = "out/phase1_char"  # a run's folder; give the option again for each further run
    checkpoint: str = "ckpt.pt"  # the file in it that is chosen first: ckpt.pt is the last state, best.pt the best
    port: int = 7860  # the page is http://127.0.0.1:port
    device: str = "auto"  # cpu, cuda, cuda:1, mps

    def __post_init__(self) -> None:
        if not 0 < self.port < 1 << 16:
            raise UserError(f"port is {self.port} but must be at least 1 and below {1 << 16}")


if __name__ == "__main__":  # before torch is imported, so that --help and mistakes answer at once
    config = configure(PlaygroundConfig)
    # A field has one value, the last that was given; this option, and no other, may be given several times.
    given = [arg.removeprefix("--out_dir=") for arg in sys.argv[1:] if arg.startswith("--out_dir=")]

import codecs
import html
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import model as gpt
from sample import SampleConfig
from support import runtime, tokenizer
from support.checkpoint import load_checkpoint
from support.log import read_log

os.environ["GRADIO_ANALYTICS_ENABLED"] = (
    "False"  # Gradio reads it when it is imported, and would report its use
)

import gradio as gr
import pandas as pd

REFRESH = 1.0  # seconds after which the page looks for new checkpoints and new figures
PAUSE = 0.1  # seconds between two versions of a text: a browser need not draw each of hundreds of tokens a second
WITH_TEXT = "prompt and text"
MODEL = threading.Lock()  # handlers run in threads, and one pass of a model is watched at a time


# Checkpoints


class Loaded(NamedTuple):
    """A checkpoint, ready to be used."""

    path: Path
    net: gpt.GPT
    tok: tokenizer.CharTokenizer | tokenizer.BPETokenizer
    step: int
    start: str  # the prompt of the run's own samples


def file_version(path: Path) -> tuple | None:
    """What is another when the file is; None if there is none."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


class Checkpoints:
    """Those of some runs. Each is read when it is first asked for, and again when its file is another."""

    def __init__(
        self, out_dirs: list[str], first: str = "ckpt.pt", device: torch.device | str = "cpu"
    ) -> None:
        self.out_dirs = list(dict.fromkeys(map(Path, out_dirs)))
        self.names = list(dict.fromkeys((first, "ckpt.pt", "best.pt")))
        self.device = device
        self.loaded: dict[Path, tuple[tuple | None, Loaded]] = {}
        self.lock = threading.Lock()

    def found(self) -> list[str]:
        """The paths of those that are there now."""
        paths = (out_dir / name for out_dir in self.out_dirs for name in self.names)
        return [str(path) for path in paths if path.is_file()]

    def load(self, path: str | None) -> Loaded:
        """The checkpoint as it is on the disk now. Raises UserError."""
        if not path:
            raise UserError(
                f"no checkpoint yet in {', '.join(map(str, self.out_dirs))}; train one, it is then offered"
            )
        path = Path(path)
        with self.lock:
            version = file_version(path)
            if path not in self.loaded or self.loaded[path][0] != version:
                net, checkpoint = load_checkpoint(path)
                net.to(self.device).eval()
                tok = tokenizer.from_dict(checkpoint["tokenizer"])
                start = checkpoint.get("train_config", {}).get("sample_start", "\n")
                self.loaded[path] = version, Loaded(path, net, tok, checkpoint["step"], start)
            return self.loaded[path][1]


def describe(loaded: Loaded) -> str:
    """The step of a checkpoint, and the validation loss that the log of its run has for it."""
    try:
        records = read_log(loaded.path.parent / "log.jsonl")
    except (UserError, OSError):
        records = []
    evaluations = [r for r in records if "val_loss" in r and r["step"] <= loaded.step]
    if not evaluations:
        return f"step {loaded.step:,}, no validation loss in its log"
    last = evaluations[-1]
    loss = f"validation loss {last['val_loss']:.3f}"
    if last["step"] < loaded.step:
        return f"step {loaded.step:,}, {loss} at step {last['step']:,}"
    return f"step {loaded.step:,}, epoch {last['epoch']:.3g}, {loss}"


def same_weights(a: gpt.GPT, b: gpt.GPT) -> bool:
    return a.config == b.config and all(map(torch.equal, a.parameters(), b.parameters()))


# Write: a text, and what each of its tokens was drawn from


class Candidate(NamedTuple):
    rank: int  # 1 is the likeliest
    label: str
    before: float  # its probability as the model gave it
    after: float  # and as it was drawn: after temperature, top_k and top_p
    drawn: bool


class Token(NamedTuple):
    text: str  # what it adds to the text; empty where a character is not whole yet
    candidates: list[Candidate]  # ten; one more if the token that was drawn is not among them

    @property
    def drawn(self) -> Candidate:
        return next(candidate for candidate in self.candidates if candidate.drawn)


class Text(NamedTuple):
    sampling: SampleConfig
    tokens: list[Token]

    def __str__(self) -> str:
        return self.sampling.start + "".join(token.text for token in self.tokens)


def probabilities(
    logits: Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None
) -> tuple[Tensor, Tensor]:
    """The distribution of logits (V,), float32, and that which `model.sample_token` draws from; each (V,)."""
    before = logits.softmax(dim=-1)
    after = torch.zeros_like(before)
    if temperature == 0:
        after[logits.argmax()] = 1
    else:
        ids, weights = gpt.candidates(logits[None], temperature, top_k, top_p)
        after[ids[0]] = weights[0] / weights[0].sum()
    return before, after


def write(loaded: Loaded, sampling: SampleConfig) -> Iterator[Token]:
    """Continue the prompt as sample.py does, token by token."""
    net, tok = loaded.net, loaded.tok
    device = next(net.parameters()).device
    prompt = torch.tensor([tok.encode(sampling.start)], device=device)  # (1, T)
    draw = (sampling.temperature, sampling.top_k, sampling.top_p)
    stream = net.generate(
        prompt, sampling.max_new_tokens, *draw, torch.Generator(device).manual_seed(sampling.seed)
    )
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    passes = []  # (logits, loss) of each
    while True:
        with MODEL:
            hook = net.register_forward_hook(lambda module, args, output: passes.append(output))
            try:
                drawn = next(stream, None)
            finally:
                hook.remove()
        if drawn is None or drawn.item() == getattr(tok, "end_of_text", -1):
            return
        drawn = drawn.item()
        before, after = probabilities(passes.pop()[0][0, -1].float(), *draw)
        top = before.topk(min(10, len(before))).indices.tolist()
        candidates = []
        for i in top if drawn in top else [*top, drawn]:
            rank = top.index(i) + 1 if i in top else int((before > before[i]).sum()) + 1
            name = label(tok.decode_bytes([i]))
            candidates.append(Candidate(rank, name, before[i].item(), after[i].item(), i == drawn))
        yield Token(decoder.decode(tok.decode_bytes([drawn])), candidates)


def label(piece: bytes) -> str:
    """A token by itself: what can not be seen has a sign, and bytes that are no character their number."""
    signs = {" ": "␣", "\n": "↵", "\t": "⇥"}
    text = piece.decode("utf-8", "backslashreplace")
    return "".join(signs.get(c) or (c if c.isprintable() else ascii(c)[1:-1]) for c in text)


# Attention: which token looks at which


def look(net: gpt.GPT, idx: Tensor, masked: bool = True) -> tuple[list[Tensor], float]:
    """Each layer's attention weights, (nh, T, T), over idx (1, T), T >= 2, and the loss.

    A row has the weights of one query over all keys; without the mask those are also the tokens after it.
    The loss is the mean over the T - 1 tokens that have one before them, in nats. For this one pass
    `model.attention` is replaced by its formula written out.
    """
    layers = []

    def attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (1, nh, T, T)
        if masked:
            scores = scores.masked_fill(
                torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf
            )
        weights = scores.softmax(dim=-1)
        layers.append(weights[0].float().cpu())
        return weights @ v

    targets = torch.cat((idx[:, 1:], idx.new_full((1, 1), -1)), dim=1)  # the last token has none
    with MODEL, torch.no_grad():
        as_it_was, gpt.attention = gpt.attention, attention
        try:
            loss = net(idx, targets)[1]
        finally:
            gpt.attention = as_it_was
    return layers, loss.item()


# HTML


def notice(sentence: object) -> str:
    """What the user has to know or can put right."""
    return f'<p class="notice" role="alert">{html.escape(str(sentence))}</p>'


def shade(p: float) -> str:
    """How far along the scale a probability's colour is: its root, which tells 1% from 5% as well as 50% from 80%."""
    return f"{math.sqrt(p):.2f}"


def percent(p: float) -> str:
    return "0%" if p == 0 else "&lt;0.1%" if p < 0.0005 else f"{100 * p:.1f}%"


def prompt_html(start: str) -> str:
    return f'<span class="prompt">{html.escape(start)}</span>'


def token_html(token: Token, number: int) -> str:
    text = html.escape(token.text).replace(
        "\n", "<i>↵</i>\n"
    )  # so that a line end can be seen and clicked on
    p = token.drawn.before
    return f'<span class="token" style="--shade:{shade(p)}" title="{percent(p)}" data-token="{number}">{text}</span>'


def candidates_html(text: Text, number: int) -> str:
    """The table of what one token was drawn from."""
    token, sampling = text.tokens[number], text.sampling
    rows = "".join(
        f'<tr{" class=drawn" if c.drawn else ""}><td>{c.rank:,}</td><th scope="row">{html.escape(c.label)}</th>'
        f'<td class="bar" style="--p:{c.before:.4f}">{percent(c.before)}</td>'
        f'<td class="bar" style="--p:{c.after:.4f}">{percent(c.after)}</td></tr>'
        for c in token.candidates
    )
    settings = f"temperature {sampling.temperature:g}"
    settings += f", top-k {sampling.top_k}" if sampling.top_k else ""
    settings += f", top-p {sampling.top_p:g}" if sampling.top_p else ""
    return (
        f"<p>Token {number + 1}, <b>{html.escape(token.drawn.label)}</b>, was drawn from:</p>"
        '<table><thead><tr><th></th><th scope="col">token</th><th scope="col">before</th>'
        f'<th scope="col">after</th></tr></thead><tbody>{rows}</tbody></table>'
        f"<p>Before: as the model has it. After: as it was drawn, with {settings}.</p>"
    )


def heat_map(weights: Tensor, labels: list[str], masked: bool) -> str:
    """An SVG of the weights (T, T) of one head: rows are queries, columns are keys."""
    T, size = len(labels), 16
    labels = [name if len(name) <= 9 else name[:8] + "…" for name in labels]
    longest = max(map(len, labels))
    margin = 26 + 7 * longest
    side = margin + T * size + 1
    cells, names = [], []
    for row in range(T):
        for column in range(row + 1 if masked else T):
            p = weights[row, column].item()
            tip = f"{labels[row]} looks at {labels[column]}: {percent(p)}"
            cells.append(
                f'<rect class="{"future" if column > row else "past"}" x="{margin + column * size}" '
                f'y="{margin + row * size}" width="{size}" height="{size}" fill-opacity="{shade(p)}">'
                f"<title>{html.escape(tip, quote=False)}</title></rect>"
            )
        name, middle = html.escape(labels[row]), margin + (row + 0.5) * size
        names.append(f'<text x="{margin - 5}" y="{middle + 4}" text-anchor="end">{name}</text>')
        turned = f'transform="translate({middle + 4} {margin - 5}) rotate(-90)"'
        upright = f'x="{middle}" y="{margin - 5}" text-anchor="middle"'
        names.append(f"<text {upright if longest == 1 else turned}>{name}</text>")
    steps = "".join(f"h{size}v{size}" for _ in range(T))
    triangle = (
        f"M{margin} {margin}{steps}"  # the staircase: below it lies the past, above it the future
    )
    hidden = f'<path class="hidden" d="{triangle}V{margin}Z"/>' if masked else ""
    end = margin + T * size
    words = f'<text class="axis" x="{end - 6}" y="{margin + 20}" text-anchor="end">the future, masked</text>'
    return (
        f'<svg viewBox="0 0 {side} {side}" style="min-width:{round(0.75 * side)}px" role="img" '
        f'aria-label="attention {"with" if masked else "without"} the mask">'
        f'{hidden}{"".join(cells)}<path class="stairs" d="{triangle}"/>{"".join(names)}{words if masked else ""}'
        f'<text class="axis" x="{margin}" y="11">looked at (keys) →</text>'
        f'<text class="axis" transform="translate(11 {end}) rotate(-90)">looking (queries) →</text></svg>'
    )


def attention_html(loaded: Loaded, text: str, count: int, layer: int, head: int) -> tuple[str, str]:
    """Both maps over the first `count` tokens of `text`, and a sentence on the two losses. Layers and heads from 0."""
    ids = loaded.tok.encode(text)
    shown = ids[: min(count, loaded.net.config.block_size)]
    if len(shown) < 2:
        raise UserError(
            f"{text!r} has {len(shown)} tokens; to see one look at another, it takes two"
        )
    idx = torch.tensor([shown], device=next(loaded.net.parameters()).device)
    labels = [label(loaded.tok.decode_bytes([i])) for i in shown]
    maps, losses = [], []
    for masked in (True, False):
        layers, loss = look(loaded.net, idx, masked)
        weights = layers[layer][head]
        future = weights.triu(1).sum().item() / len(shown)
        title = "With the mask" if masked else "With the mask taken off"
        losses.append(loss)
        maps.append(
            f"<figure><figcaption><b>{title}</b><br>loss {loss:.3f} nats per token, "
            f"{percent(future)} of the attention on the future</figcaption>"
            f'<div class="scroll">{heat_map(weights, labels, masked)}</div></figure>'
        )
    return f'<div class="maps">{"".join(maps)}</div>{MAP_LEGEND}', verdict(
        *losses, len(shown), len(ids)
    )


def verdict(masked: float, unmasked: float, shown: int, tokens: int) -> str:
    """What the two losses say of the model."""
    if unmasked < masked / 2:
        said = (
            f"With the mask off, the loss falls from {masked:.3f} to {unmasked:.3f}: impossibly good. This model was "
            "trained without the mask; it has learned to read the answer off the next token, which is not there when "
            "it writes."
        )
    else:
        said = (
            f"With the mask off, the loss goes from {masked:.3f} to {unmasked:.3f}. A model that was trained with the "
            "mask has never learned to use what comes after a token; one that was trained without it gets an "
            "impossibly good loss here: <code>python lessons.py</code> makes one, <code>out/lessons/no_mask</code>."
        )
    return f"<p>{said} The text is {'' if shown == tokens else f'the first {shown} of '}{tokens:,} tokens.</p>"


def card_html(path: str, said: str, text: str) -> str:
    return f'<article><h3>{html.escape(path)}</h3><p>{html.escape(said)}</p><div class="text">{text}</div></article>'


# The page


def sampling_config(start: str, temperature, top_k, top_p, max_new_tokens, seed) -> SampleConfig:
    """What the controls say, checked. Raises UserError."""
    if not start:
        raise UserError("The prompt is empty, and a model can only go on from something.")
    if None in (temperature, top_k, top_p, max_new_tokens, seed):  # a field that was emptied
        raise UserError("Temperature, top-k, top-p, tokens and seed each need a number.")
    return SampleConfig(
        start=start,
        temperature=temperature,
        top_k=int(top_k) or None,
        top_p=top_p if top_p < 1 else None,
        max_new_tokens=int(max_new_tokens),
        seed=int(seed),
    )


def about(loaded: Loaded, start: str) -> str:
    """A line on a checkpoint and on what it can see of the prompt."""
    tokens, seen = len(loaded.tok.encode(start)), loaded.net.config.block_size
    cut = (
        f"; of the prompt's {tokens:,} tokens this model sees the last {seen:,}"
        if tokens > seen
        else ""
    )
    return describe(loaded) + cut


def begin(turns: dict[str, int], what: str) -> Callable[[], bool]:
    """Count a new turn of writing; the function says whether it is still that, and not one that came later."""
    turns[what] = turn = turns.get(what, 0) + 1
    return lambda: turns[what] == turn


class Page:
    """What the controls of the page do; `blocks` lays them out.

    A handler returns what its outputs show. What the user can put right is a sentence among them, never an exception.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints

    def on_write(self, turns: dict, path: str | None, *controls) -> Iterator[tuple]:
        """The text as it grows: a line on its checkpoint, HTML, the Text, and the candidates of its first token."""
        is_turn = begin(turns, "write")
        try:
            sampling = sampling_config(*controls)
            loaded = self.checkpoints.load(path)
            said = f"<p>{html.escape(about(loaded, sampling.start))}</p>"
            text, shown, sent = Text(sampling, []), prompt_html(sampling.start), 0.0
            for number, token in enumerate(write(loaded, sampling)):
                if not is_turn():
                    return
                text.tokens.append(token)
                shown += token_html(token, number)
                if number == 0:
                    yield said, gr.HTML(shown, chosen=0), text, candidates_html(text, 0)
                elif time.monotonic() - sent > PAUSE:
                    yield said, shown, text, gr.skip()
                    sent = time.monotonic()
            yield said, shown, text, gr.skip() if text.tokens else ""
        except (UserError, OSError) as error:
            yield notice(error), "", None, ""

    def on_token(self, text: Text | None, event: gr.EventData) -> str:
        """The candidates of the token that was clicked on."""
        return candidates_html(text, event.token) if text and event.token < len(text.tokens) else ""

    def on_attention(
        self,
        path: str | None,
        start: str,
        text: Text | None,
        over: str,
        layer: int,
        head: int,
        count: int,
    ) -> tuple:
        """A sentence, the maps, and as many layers and heads to choose from as the model has."""
        try:
            loaded = self.checkpoints.load(path)
            layers, heads = (
                list(range(1, n + 1)) for n in (loaded.net.config.n_layer, loaded.net.config.n_head)
            )
            layer, head = min(layer, layers[-1]), min(head, heads[-1])
            if not start:
                raise UserError("The prompt is empty, and there is nothing to look at.")
            continued = over == WITH_TEXT and text and text.sampling.start == start
            maps, said = attention_html(
                loaded, str(text) if continued else start, int(count), layer - 1, head - 1
            )
        except (UserError, OSError) as error:
            return notice(error), "", gr.skip(), gr.skip()
        return said, maps, gr.Radio(layers, value=layer), gr.Radio(heads, value=head)

    def on_compare(self, turns: dict, chosen: list[str], *controls) -> Iterator[str]:
        """Cards, one a checkpoint, written one after the other."""
        is_turn = begin(turns, "compare")
        try:
            sampling = sampling_config(*controls)
            if not chosen:
                raise UserError("No checkpoint is chosen.")
        except UserError as error:
            yield notice(error)
            return
        done, sent, written = "", 0.0, []
        for path in chosen:
            try:
                loaded = self.checkpoints.load(path)
                twin = next(
                    (other.path for other in written if same_weights(other.net, loaded.net)), None
                )
                said, shown = about(loaded, sampling.start), prompt_html(sampling.start)
                if twin:
                    said, shown = f"{said}; the same weights as {twin}, so the same text", ""
                else:
                    written.append(loaded)
                    for number, token in enumerate(write(loaded, sampling)):
                        if not is_turn():
                            return
                        shown += token_html(token, number)
                        if time.monotonic() - sent > PAUSE:
                            yield done + card_html(path, said, shown)
                            sent = time.monotonic()
                done += card_html(path, said, shown)
            except (UserError, OSError) as error:
                done += card_html(path, str(error), "")
            yield done

    def on_loss(self, out_dir: str, seen: tuple | None) -> tuple:
        """A line on the last figures, the curve, and the version of their log; nothing if it was `seen`."""
        path = Path(out_dir) / "log.jsonl"
        try:
            version = (out_dir, file_version(path))
            if version == seen:
                return gr.skip(), gr.skip(), gr.skip()
            records = read_log(path)
        except (UserError, OSError) as error:
            return notice(error), None, None
        kinds = {"loss": "each batch", "train_loss": "training", "val_loss": "validation"}
        rows = [
            (r["step"], r[key], kind)
            for key, kind in kinds.items()
            for r in records
            if r.get(key) is not None
        ]
        said = "no figures yet"
        if rows:
            last = {
                kind: f", {kind} loss {loss:.3f}" for _, loss, kind in rows if kind != "each batch"
            }
            said = f"step {records[-1]['step']:,}, epoch {records[-1]['epoch']:.3g}{''.join(last.values())}"
        return (
            f"<p>{html.escape(said)}</p>",
            pd.DataFrame(rows, columns=["step", "loss", "of"]),
            version,
        )

    def on_tick(self, chosen: str | None, compared: list[str], known: list[str]) -> tuple:
        """Offer the checkpoints that have come. What is chosen stays so, also while training replaces its file."""
        found = self.checkpoints.found()
        if found == known:
            return gr.skip(), gr.skip(), gr.skip(), gr.skip()
        choices = [chosen, *found] if chosen and chosen not in found else found
        compared = [path for path in found if path in compared or path not in known]
        return (
            gr.Dropdown(choices, value=chosen or next(iter(found), None)),
            gr.CheckboxGroup(found, value=compared),
            self.title_html(found),
            found,
        )

    def title_html(self, found: list[str]) -> str:
        empty = [
            str(out_dir)
            for out_dir in self.checkpoints.out_dirs
            if out_dir not in {Path(f).parent for f in found}
        ]
        sentence = f"No checkpoint yet in {', '.join(empty)}; it is offered here when there is one."
        return f"<h1>What the model thinks</h1>{notice(sentence) if empty else ''}"

    def blocks(self) -> gr.Blocks:
        found = self.checkpoints.found()
        try:
            start = self.checkpoints.load(found[0]).start if found else "ROMEO:"
        except UserError:  # which the page shows when the checkpoint is used
            start = "ROMEO:"
        with gr.Blocks(title="gpt2-from-scratch", analytics_enabled=False) as blocks:
            title = gr.HTML(self.title_html(found))
            known, text, seen, turns = gr.State(found), gr.State(None), gr.State(None), gr.State({})
            with gr.Row():
                prompt = gr.Textbox(
                    start, label="Prompt", lines=2, max_lines=6, scale=3, min_width=300
                )
                path = gr.Dropdown(found, label="Checkpoint", scale=2, min_width=300)

            with gr.Tab("Write"):
                with gr.Row(equal_height=False):
                    with gr.Column(scale=3, min_width=300):
                        with gr.Row():
                            go = gr.Button("Write", variant="primary", scale=0, min_width=120)
                            stop = gr.Button("Stop", scale=0, min_width=120)
                        said = gr.HTML(elem_id="said")
                        shown = gr.HTML(
                            html_template='<div class="text">${value}</div>',
                            css_template=CHOSEN_CSS,
                            js_on_load=CHOOSE_JS,
                            chosen=-1,
                            min_height=340,
                            max_height=340,
                            autoscroll=True,
                            elem_id="text",
                        )
                        gr.HTML(LEGEND)
                    with gr.Column(scale=2, min_width=300):
                        drawn_from = gr.HTML(elem_id="candidates")
                with gr.Row():
                    wide = {"min_width": 200}
                    temperature = gr.Slider(
                        0, 2, 0.8, step=0.05, label="Temperature", info="0: the likeliest", **wide
                    )
                    top_k = gr.Slider(
                        0, 100, 0, step=1, label="Top-k", info="0: all tokens", **wide
                    )
                    top_p = gr.Slider(
                        0.05, 1, 1, step=0.05, label="Top-p", info="1: all tokens", **wide
                    )
                    length = gr.Slider(1, 500, 300, step=1, label="Tokens", info="to write", **wide)
                    seed = gr.Number(
                        1337,
                        label="Seed",
                        info="repeats a text",
                        precision=0,
                        minimum=0,
                        min_width=120,
                    )

            with gr.Tab("Attention") as attention_tab:
                with gr.Row():
                    layer = gr.Radio([1], value=1, label="Layer", min_width=160)
                    head = gr.Radio([1], value=1, label="Head", min_width=160, elem_id="head")
                    over = gr.Radio(
                        ["prompt", WITH_TEXT],
                        value=WITH_TEXT,
                        label="Over",
                        min_width=200,
                        elem_id="over",
                    )
                    count = gr.Slider(2, 64, 24, step=1, label="Tokens, at most", min_width=200)
                verdict = gr.HTML(elem_id="verdict")
                maps = gr.HTML(elem_id="maps")

            with gr.Tab("Compare"):
                compared = gr.CheckboxGroup(found, value=found, label="Checkpoints")
                with gr.Row():
                    compare = gr.Button("Compare", variant="primary", scale=0, min_width=120)
                cards = gr.HTML(html_template='<div class="cards">${value}</div>', elem_id="cards")

            with gr.Tab("Loss") as loss_tab:
                out_dir = gr.Dropdown(
                    [str(out_dir) for out_dir in self.checkpoints.out_dirs], label="Run"
                )
                figures = gr.HTML(elem_id="figures")
                curve = gr.LinePlot(
                    x="step",
                    y="loss",
                    color="of",
                    y_title="loss (nats per token)",
                    color_title="",
                    height=420,
                    elem_id="curve",
                    color_map={
                        "each batch": "#9ca3af",
                        "training": "#3b82f6",
                        "validation": "#f97316",
                    },
                )

            quiet = {"show_progress": "hidden"}
            sampling = [prompt, temperature, top_k, top_p, length, seed]
            at_once = {
                "trigger_mode": "multiple",
                "concurrency_limit": None,
            }  # a new turn ends the one before
            writing = {
                "inputs": [turns, path, *sampling],
                "outputs": [said, shown, text, drawn_from],
                **quiet,
                **at_once,
            }
            offering = {
                "inputs": [path, compared, known],
                "outputs": [path, compared, title, known],
                **quiet,
            }
            drawing = {"inputs": [out_dir, seen], "outputs": [figures, curve, seen], **quiet}

            blocks.load(self.on_tick, **offering).then(self.on_write, **writing)
            for event in (go.click, prompt.submit):
                event(self.on_write, **writing)
            stop.click(lambda turns: begin(turns, "write") and None, turns, **quiet)
            shown.click(self.on_token, text, drawn_from, **quiet)
            for event in (
                attention_tab.select,
                layer.input,
                head.input,
                over.input,
                count.release,
                path.input,
                prompt.blur,
            ):
                event(
                    self.on_attention,
                    [path, prompt, text, over, layer, head, count],
                    [verdict, maps, layer, head],
                    **quiet,
                )
            compare.click(self.on_compare, [turns, compared, *sampling], cards, **quiet, **at_once)
            timer = gr.Timer(REFRESH)
            timer.tick(self.on_tick, **offering)
            for event in (timer.tick, loss_tab.select, out_dir.input):
                event(self.on_loss, **drawing)
        return blocks


def launch(blocks: gr.Blocks, port: int, **options) -> str:
    """Serve the page on this machine alone; returns its address."""
    # Named fonts would be Google's; names of the system's own are fetched from nowhere.
    theme = gr.themes.Base(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    theme.set(block_info_text_color="*neutral_500")
    return blocks.launch(
        server_name="127.0.0.1",
        server_port=port,
        share=False,
        ssr_mode=False,
        quiet=True,
        footer_links=[],
        theme=theme,
        css=CSS,
        **options,
    )[1]


# Sentences, style and script of the page

LEGEND = """<p>Colour: the probability that the model gave the token.
<span class="scale sure"><i>0%</i><i>25%</i><i>100%</i></span> Click on one; the arrow keys go to the next.</p>"""
MAP_LEGEND = """<p>A row is a token that looks, a column one that is looked at; a row adds up to 100%:
<span class="scale past"><i>0%</i><i>25%</i><i>100%</i></span> itself and the past,
<span class="scale future"><i>0%</i><i>25%</i><i>100%</i></span> the future.</p>"""
CHOSEN_CSS = '.token[data-token="${chosen}"] { outline: 2px solid var(--body-text-color); }'
CHOOSE_JS = """
const choose = token => {
    if (token) {
        props.chosen = Number(token.dataset.token);
        trigger("click", {token: props.chosen});
    }
};
element.tabIndex = 0;
element.addEventListener("click", event => choose(event.target.closest("[data-token]")));
element.addEventListener("keydown", event => {
    const step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (step) choose(element.querySelector(`[data-token="${props.chosen + step}"]`));
});
"""
CSS = """
:root { --sure: #c3e0ff; --unsure: #ffc59c; --past: #1d4ed8; --future: #c2410c; --hidden: #e5e7eb; }
.dark { --sure: #1c4670; --unsure: #8f4210; --past: #60a5fa; --future: #fb923c; --hidden: #27272a; }
h1 { margin: 0; font-size: 1.5rem; }
.notice { margin: 0; padding: 8px 12px; border-left: 4px solid var(--future); background: var(--hidden); }
.main.app { padding-inline: clamp(12px, 4vw, 32px) !important; }
.html-container { padding: 0; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; font: 15px/1.75 ui-monospace, monospace; }
#text, #cards article { border: 1px solid var(--border-color-primary) !important; border-radius: 6px; }
#text .text, #cards article { padding: 10px 14px; }
.prompt { font-weight: 700; }
.token { background: color-mix(in oklab, var(--sure) calc(var(--shade) * 100%), var(--unsure)); }
.token:empty { padding: 0 0.25em; }
.token i { opacity: 0.45; }
#text .token { cursor: pointer; }
.scale { display: inline-flex; justify-content: space-between; width: 9rem; padding: 0 0.4em; border-radius: 3px; }
.scale i { font-style: normal; font-size: 0.8em; line-height: 1.6; }
.scale:not(.sure) i:last-child { color: var(--body-background-fill); }
.scale.sure { background: linear-gradient(in oklab to right, var(--unsure), var(--sure)); }
.scale.past { background: linear-gradient(to right, transparent, var(--past)); }
.scale.future { background: linear-gradient(to right, transparent, var(--future)); }
#candidates table { width: 100%; margin: 8px 0; border: 0; border-collapse: collapse; }
#candidates tr { border: 0; font-variant-numeric: tabular-nums; }
#candidates :is(td, th) { padding: 4px 8px; border: 0; border-bottom: 1px solid var(--border-color-primary); }
#candidates td:first-child { text-align: right; width: 3rem; }
#candidates th { text-align: left; font-weight: 400; }
#candidates tbody th { font-family: ui-monospace, monospace; }
#candidates .bar { width: 34%; background: linear-gradient(90deg, var(--sure) calc(var(--p) * 100%), transparent 0); }
#candidates .drawn :is(td, th) { font-weight: 700; }
.maps, .cards { display: grid; gap: 20px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
.maps figure, .cards article { margin: 0; min-width: 0; }
.scroll { overflow-x: auto; }
#cards h3 { margin: 0 0 4px; font-size: 1rem; }
.maps svg { display: block; width: 100%; height: auto; color: var(--body-text-color); }
.maps text { font: 11px ui-monospace, monospace; fill: currentColor; }
.maps .axis { font: 11px system-ui, sans-serif; opacity: 0.75; }
.maps .past { fill: var(--past); }
.maps .future { fill: var(--future); }
.maps .hidden { fill: var(--hidden); }
.maps .stairs { fill: none; stroke: currentColor; stroke-width: 1.2; }
"""


def main(config: PlaygroundConfig, out_dirs: list[str]) -> None:
    device = runtime.resolve_device(config.device)
    blocks = Page(Checkpoints(out_dirs, config.checkpoint, device)).blocks()
    print(f"http://127.0.0.1:{config.port} has the page; Ctrl-C ends it", flush=True)
    launch(blocks, config.port)


if __name__ == "__main__":
    run(lambda config: main(config, given or [config.out_dir]), config)
