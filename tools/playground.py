"""Show in a browser what a model thinks.

    python -m tools.playground --out_dir=out/phase1_char,out/phase2_bpe

The page has five tabs:

    Write      a text; for each token its candidates, and the most likely tokens after each layer
    Tokens     the pieces of the prompt, their ids and their probabilities
    Attention  the maps of all heads, with and without the mask
    Compare    one prompt continued by several checkpoints
    Learning   the losses and the samples of a run, also while it trains

This file computes and answers requests with plain data. playground.html is the layout, and
playground.js draws the data. It draws text, never HTML, so a prompt, a token or a file name can not
become part of the page's code.
"""

import codecs
import json
import math
import os
import re
import sys
import threading
from collections.abc import Iterator
from configurator import UserError, check_range, configure, read_options, run
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from model import GPT, candidates
from sample import SampleConfig
from support import tokenizer as tokenizers
from support.checkpoint import build_model, load_checkpoint
from support.log import read_log
from support.runtime import explain_out_of_memory, resolve_device

MODEL_LOCK = threading.Lock()  # requests run in threads; one at a time observes or changes a model
LARGEST_REQUEST = 1_000_000  # bytes
LARGEST_MAPS = 1_000_000  # attention weights in an answer, each up to 6 bytes
ACTIONS = ("runs", "write", "tokens", "attention", "log")  # POST calls these methods of Playground
FILES = {"/": "html", "/playground.css": "css", "/playground.js": "javascript"}  # GET answers these
HEADERS = {
    # The page loads nothing from other hosts, runs no inline script, and can not be framed.
    "Content-Security-Policy": "default-src 'self'; img-src data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class PlaygroundConfig:
    """Show in a browser on this machine what the models of one or more runs think."""

    out_dir: str = "out/phase1_char"  # folder of a run, or of several: out/a,out/b
    checkpoint: str = "ckpt.pt"  # file selected first; best.pt has the lowest loss
    port: int = 7860  # the address of the page is http://127.0.0.1:port
    device: str = "auto"  # cpu, cuda, cuda:1, mps

    def __post_init__(self) -> None:
        check_range(self, 1, 65535, "port")


class Loaded(NamedTuple):
    """A checkpoint that is ready to be used."""

    path: Path
    model: GPT
    tokenizer: tokenizers.Tokenizer
    step: int
    start: str  # the prompt of the samples that the run logged

    def label(self, i: int) -> str:
        """Return what the page shows for token id `i`."""
        return visible(self.tokenizer.decode_bytes([i]))


def changed_at(path: Path) -> float:
    """Return when a file was last changed, in seconds; 0 if there is no file."""
    return path.stat().st_mtime if path.exists() else 0.0


class Checkpoints:
    """The checkpoints of some runs, each loaded at its first use and after a change of its file."""

    def __init__(self, out_dirs: list[str], first: str = "ckpt.pt", device="cpu") -> None:
        self.device = device
        names = dict.fromkeys((first, "ckpt.pt", "best.pt"))
        self.runs = {out_dir: [f"{out_dir}/{name}" for name in names] for out_dir in out_dirs}
        self.loaded: dict[str, tuple[float, Loaded]] = {}  # with the time of its file
        self.lock = threading.Lock()

    def find(self) -> dict[str, list[str]]:
        """Return, for each run, the paths of the checkpoints that exist now."""
        return {run: [p for p in paths if Path(p).is_file()] for run, paths in self.runs.items()}

    def load(self, path: str) -> Loaded:
        """Return the checkpoint as it is on the disk now. Raises UserError."""
        if not any(path in paths for paths in self.runs.values()):
            raise UserError(f"{path or 'no checkpoint yet'}: choose a checkpoint of a run")
        with self.lock:
            version = changed_at(Path(path))
            if path not in self.loaded or self.loaded[path][0] != version:
                checkpoint = load_checkpoint(Path(path))
                model = build_model(checkpoint.shape, checkpoint.weights).to(self.device).eval()
                tokenizer = tokenizers.from_dict(checkpoint.tokenizer)
                start = checkpoint.train_config.get("sample_start", "\n")
                loaded = Loaded(Path(path), model, tokenizer, checkpoint.step, start)
                self.loaded[path] = version, loaded
            return self.loaded[path][1]


def describe(loaded: Loaded, prompt: str) -> str:
    """Return the step and validation loss of a checkpoint, and whether it sees the whole prompt."""
    log = loaded.path.parent / "log.jsonl"
    records = read_log(log) if log.exists() else []
    text = f"step {loaded.step:,}, no validation loss in its log"
    evaluations = [r for r in records if "val_loss" in r and r["step"] <= loaded.step]
    if evaluations:
        r = evaluations[-1]
        when = "" if r["step"] == loaded.step else f" at step {r['step']:,}"
        text = f"step {loaded.step:,}, validation loss {r['val_loss']:.3f}{when}"
        text += f" (epoch {r['epoch']:.3g})"
    length, limit = len(loaded.tokenizer.encode(prompt)), loaded.model.config.block_size
    if length > limit:
        text += f"; the prompt has {length:,} tokens and this model sees the last {limit:,}"
    return text


def probabilities(logits: Tensor, **sampling) -> tuple[Tensor, Tensor]:
    """Return the model's distribution and the one that a token is drawn from, each (V,).

    The second applies temperature, top_k and top_p to `logits`, (V,), as `model.sample_token` does.
    """
    before = logits.softmax(dim=-1)
    after = torch.zeros_like(before)
    ids, weights = candidates(logits[None], **sampling)
    after[ids[0]] = weights[0] / weights[0].sum()
    return before, after


def next_token(model: GPT, stream: Iterator[Tensor]) -> tuple[int, Tensor] | None:
    """Return the next token id of a stream and the logits after each layer; None at the end.

    The logits are (n_layer, V): the final LayerNorm and the head read the state after each layer as
    they read the last one. The last row holds the model's own logits. The other rows are the logit
    lens (nostalgebraist 2020, "interpreting GPT: the logit lens", LessWrong).
    """
    states = []
    with MODEL_LOCK, torch.no_grad():
        hooks = [
            block.register_forward_hook(lambda block, args, x: states.append(x[0, -1]))
            for block in model.transformer.h
        ]
        try:
            token = next(stream, None)
        finally:
            for hook in hooks:
                hook.remove()
        if token is None:
            return None
        x = model.transformer.ln_f(torch.stack(states))  # (n_layer, C)
        return token.item(), model.lm_head(x)[:, : model.config.vocab_size].float()


def continue_with(
    model: GPT, idx: Tensor, choice: int | None, count: int, **sampling
) -> Iterator[Tensor]:
    """Yield `choice`, unless it is None, and then `count` drawn tokens, each (1, 1)."""
    if choice is not None:
        model(idx[:, -model.config.block_size :])  # next_token reads the layers of this pass
        idx = torch.cat((idx, idx.new_tensor([[choice]])), dim=1)
        yield idx[:, -1:]
    yield from model.generate(idx, count, **sampling)


def write(
    loaded: Loaded, options: SampleConfig, written: list[int], choice: int | None = None
) -> Iterator[dict]:
    """Yield each token of the text that sample.py prints with these options and dtype=float32.

    The text has got as far as the token ids `written`, and a `choice` comes next. A text written in
    parts is the text written at once, because the random numbers of the parts before are skipped.

    A token has ten candidates, and an eleventh if the one that was taken is not among them. It also
    has the three most likely tokens after each layer.
    """
    model, tokenizer, V = loaded.model, loaded.tokenizer, loaded.model.config.vocab_size
    if not all(0 <= i < V for i in [*written, choice or 0]):
        raise ValueError("a token id is outside of the vocabulary")
    device = next(model.parameters()).device
    idx = torch.tensor([tokenizer.encode(options.start) + written], device=device)  # (1, T)
    sampling = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p")}
    generator = torch.Generator(device).manual_seed(options.seed)
    weights = torch.ones(1, min(options.top_k or V, V), device=device)
    for _ in range(len(written) + (choice is not None)):
        torch.multinomial(weights, 1, generator=generator)
    count = options.max_new_tokens
    stream = continue_with(model, idx, choice, count, generator=generator, **sampling)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # waits for a whole character
    decoder.decode(tokenizer.decode_bytes(written))

    while (result := next_token(model, stream)) is not None:
        taken, layers = result
        if taken == getattr(tokenizer, "end_of_text", None):
            return
        before, after = probabilities(layers[-1], **sampling)
        ids = before.topk(min(10, V)).indices.tolist()
        ranks = {i: rank for rank, i in enumerate(ids, start=1)}
        ranks.setdefault(taken, int((before > before[taken]).sum()) + 1)
        rows = [
            {"id": i, "rank": rank, "label": loaded.label(i), "taken": i == taken}
            | {"before": before[i].item(), "after": after[i].item()}
            for i, rank in ranks.items()
        ]
        best = layers.softmax(dim=-1).topk(min(3, V))  # (n_layer, 3)
        lens = [
            [
                {"label": loaded.label(i), "p": p, "taken": i == taken}
                for p, i in zip(*row, strict=True)
            ]
            for row in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        text = decoder.decode(tokenizer.decode_bytes([taken]))
        yield {"id": taken, "text": text, "candidates": rows, "lens": lens}


def visible(token: bytes) -> str:
    """Return a token's text with signs for white space and escapes for what can not be printed."""
    signs = {" ": "␣", "\n": "↵", "\t": "⇥"}
    text = token.decode("utf-8", "backslashreplace")
    return "".join(signs.get(c) or (c if c.isprintable() else ascii(c)[1:-1]) for c in text)


def attention_weights(model: GPT, idx: Tensor, masked: bool = True) -> tuple[list[Tensor], float]:
    """Return each layer's attention weights, (nh, T, T), for token ids `idx`, (1, T), and the loss.

    A row holds the weights of one query over all keys. Without the mask, a query also sees the
    tokens after it. The loss is the mean over the last T - 1 tokens, in nats.
    """
    layers = []

    def plain_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (1, nh, T, T)
        if masked:
            future = torch.ones_like(scores, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(future, -math.inf)
        weights = scores.softmax(dim=-1)
        layers.append(weights[0].float().cpu())
        return weights @ v

    targets = torch.cat((idx[:, 1:], idx.new_full((1, 1), -1)), dim=1)  # -1: no target
    with MODEL_LOCK, torch.no_grad(), patch("model.attention", plain_attention):
        loss = model(idx, targets)[1]
    return layers, loss.item()


class Playground:
    """Answers to the page's requests. `fields` is the JSON object that the page sent."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints

    def answer(self, action: str, fields: dict) -> Iterator[dict]:
        """Yield the answers of an action. If it fails, the last one is {"error": the reason}."""
        try:
            with explain_out_of_memory():
                yield from getattr(self, action)(fields)
        except (UserError, OSError) as error:
            yield {"error": str(error)}
        except (KeyError, TypeError, ValueError):
            yield {"error": "the request does not have the fields that this action needs"}

    def runs(self, fields: dict) -> Iterator[dict]:
        """The checkpoints of each run, and the run whose log changed last."""
        runs = self.checkpoints.find()
        newest = max(runs, key=lambda run: changed_at(Path(run, "log.jsonl")))
        yield {"runs": runs, "newest": newest}

    def write(self, fields: dict) -> Iterator[dict]:
        """A line about the checkpoint, then each token.

        To go on with a text, `written` has the ids of its tokens after the prompt. `choice` is the
        id of a candidate to put after them, or null.
        """
        loaded = self.checkpoints.load(fields["checkpoint"])
        values = {"start": loaded.start} | fields["options"]
        if not values["start"]:
            raise UserError("the prompt is empty; a model can only continue a text")
        options = read_options(SampleConfig, [f"--{key}={value}" for key, value in values.items()])
        yield {"about": describe(loaded, options.start), "prompt": options.start}
        yield from write(loaded, options, fields["written"], fields["choice"])

    def tokens(self, fields: dict) -> Iterator[dict]:
        """The first tokens of a text, each with its probability after the tokens before it."""
        loaded, text = self.checkpoints.load(fields["checkpoint"]), fields["text"]
        ids = loaded.tokenizer.encode(text)
        if not ids:
            raise UserError("the prompt is empty; it has no tokens")
        shown = ids[: loaded.model.config.block_size]
        idx = torch.tensor(shown, device=next(loaded.model.parameters()).device)
        with MODEL_LOCK, torch.no_grad():
            logits = loaded.model(idx[None])[0][0, :-1].float()  # (T - 1, V)
        losses = cross_entropy(logits, idx[1:], reduction="none").tolist()
        tokens = [
            {"id": i, "label": loaded.label(i), "p": p}
            for i, p in zip(shown, [None, *(math.exp(-x) for x in losses)], strict=True)
        ]
        loss = sum(losses) / len(losses) if losses else None
        yield {"tokens": tokens, "loss": loss, "count": len(ids), "characters": len(text)}

    def attention(self, fields: dict) -> Iterator[dict]:
        """The maps of all heads, with and without the mask, over the first tokens of a text."""
        loaded, text = self.checkpoints.load(fields["checkpoint"]), fields["text"]
        config, ids = loaded.model.config, loaded.tokenizer.encode(text)
        limit = math.isqrt(LARGEST_MAPS // (2 * config.n_layer * config.n_head))
        shown = ids[: max(0, min(fields["count"], config.block_size, limit))]
        if len(shown) < 2:
            found = f"{len(shown)} of {len(ids)} tokens are shown, but attention needs 2"
            raise UserError(f"{found}; write a longer prompt, or show more of it")
        idx = torch.tensor([shown], device=next(loaded.model.parameters()).device)
        maps = []
        for masked in (True, False):
            layers, loss = attention_weights(loaded.model, idx, masked)
            weights = (torch.stack(layers) * 10_000).round().int().tolist()  # 3412: 34.12%
            maps.append({"masked": masked, "loss": loss, "weights": weights})
        labels = [loaded.label(i) for i in shown]
        yield {"maps": maps, "labels": labels, "count": len(ids)}

    def log(self, fields: dict) -> Iterator[dict]:
        """The records in the log of a run; nothing if the page has this version of the log."""
        run = fields["run"]
        if run not in self.checkpoints.runs:
            raise UserError(f"{run}: not a run of this page")
        version = changed_at(Path(run, "log.jsonl"))
        if version == 0 or version != fields["version"]:
            keys = ("step", "epoch", "loss", "train_loss", "val_loss", "sample")
            records = read_log(Path(run, "log.jsonl"))
            yield {"version": version, "records": [{k: r.get(k) for k in keys} for r in records]}


class Server(ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = os.name == "posix"  # on Windows, two servers could share the port

    def __init__(self, playground: Playground, port: int) -> None:
        self.playground = playground
        super().__init__(("127.0.0.1", port), Handler)

    def handle_error(self, *args) -> None:
        """Print an error unless the page closed the connection because it wants another text."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(*args)


class Handler(BaseHTTPRequestHandler):
    """Serve the page's files and the actions, to pages of this server only."""

    def refusal(self) -> str:
        """Return why a request is refused; empty if it is not.

        Any web page can send requests to 127.0.0.1, and with a host name of its own that resolves
        to 127.0.0.1 (DNS rebinding) it could also read the answers.
        """
        hosts, origin = self.headers.get_all("Host", []), self.headers.get("Origin")
        if len(hosts) != 1 or not re.fullmatch(r"(127\.0\.0\.1|localhost)(:\d+)?", hosts[0]):
            return "open the page as http://127.0.0.1 or http://localhost"
        return "" if origin in (None, f"http://{hosts[0]}") else "this request is from another page"

    def do_GET(self) -> None:
        if reason := self.refusal():
            self.send_error(403, reason)
        elif self.path not in FILES:
            self.send_error(404)
        else:
            name = self.path.removeprefix("/") or "playground.html"
            self.start_answer(f"text/{FILES[self.path]}; charset=utf-8")
            self.wfile.write(Path(__file__).with_name(name).read_bytes())

    def do_POST(self) -> None:
        action, length = self.path.removeprefix("/"), self.headers.get("Content-Length", "")
        if reason := self.refusal():
            self.send_error(403, reason)
        elif action not in ACTIONS:
            self.send_error(404)
        elif not length.isdecimal() or int(length) > LARGEST_REQUEST:
            self.send_error(413)
        else:
            try:
                fields = json.loads(self.rfile.read(int(length)))
            except (ValueError, RecursionError):
                fields = None  # which has none of the fields that an action needs
            self.start_answer("application/x-ndjson; charset=utf-8")
            for answer in self.server.playground.answer(action, fields):
                self.wfile.write(json.dumps(answer).encode() + b"\n")

    def start_answer(self, content_type: str) -> None:
        self.send_response(200)
        for name, value in {"Content-Type": content_type, **HEADERS}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *args) -> None:
        """Do not print a line per request."""


def main(config: PlaygroundConfig) -> None:
    out_dirs, device = config.out_dir.split(","), resolve_device(config.device)
    playground = Playground(Checkpoints(out_dirs, config.checkpoint, device))
    for out_dir, paths in playground.checkpoints.find().items():
        if not paths:
            print(f"{out_dir}: no checkpoint yet; the page offers it when it exists")
    try:
        server = Server(playground, config.port)
    except OSError as error:
        raise UserError(f"port {config.port}: {error.strerror}; choose another --port") from None
    print(f"open http://127.0.0.1:{config.port} in a browser; Ctrl-C ends the program", flush=True)
    with server:
        server.serve_forever()


if __name__ == "__main__":
    run(main, configure(PlaygroundConfig))
