"""Show in a browser what a model thinks, or write the page and the model as one file.

    python -m tools.playground --out_dir=out/phase1_char,out/phase2_bpe
    python -m tools.playground --out_dir=out/phase1_char --to=romeo.html

This file computes and answers requests with plain data. playground.html is the layout, and
playground.js draws the data. It draws text, never HTML, so a prompt, a token or a file name can not
become part of the page's code. In a file that --to wrote, engine.js answers the same requests.
"""

import json
import math
import os
import re
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer
from typing import Literal, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from configurator import UserError, check_range, configure, read_options, run
from model import GPT
from sample import SampleConfig
from support.hub import load_model
from support.log import read_log
from support.runtime import explain_out_of_memory, resolve_device
from support.tokenizer import Tokenizer
from tools.onepage import write_page

MODEL_LOCK = threading.Lock()  # requests run in threads; one at a time observes or changes a model
LARGEST_REQUEST = 1_000_000  # bytes
ACTIONS = ("runs", "write", "look", "read", "log")  # POST calls these methods of Playground
FILES = {"/": "html", "/playground.css": "css", "/playground.js": "javascript"}  # GET answers these
FILES["/engine.js"] = "javascript"
LOCAL = ("127.0.0.1", "localhost")  # host names of this machine
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
    host: str = "127.0.0.1"  # another name: other machines may open the page under it
    port: int = 7860  # the address of the page is http://host:port
    to: str = ""  # write one HTML file with the model inside
    weights: Literal["float16", "float32"] = "float16"  # number format in the file
    device: str = "auto"  # cpu, cuda, cuda:1, mps

    def __post_init__(self) -> None:
        check_range(self, 1, 65535, "port")
        if self.to and "," in self.out_dir:
            raise UserError(f"out_dir={self.out_dir} names several runs; --to takes one run")


class Loaded(NamedTuple):
    """A checkpoint that is ready to be used."""

    model: GPT
    tokenizer: Tokenizer
    step: int
    start: str  # the prompt of the samples that the run logged

    def facts(self) -> dict:
        """Return what the page says about the model."""
        shape, parameters = asdict(self.model.config), self.model.num_params()
        return {"config": shape, "parameters": parameters, "step": self.step, "start": self.start}

    def tokens(self, ids: Iterable[int]) -> list[dict]:
        """Return token ids with their bytes, each byte as a character of Latin-1."""
        decode = self.tokenizer.decode_bytes
        return [{"id": i, "bytes": decode([i]).decode("latin-1")} for i in ids]

    def encode(self, text: str, written: Iterable[int] = ()) -> list[int]:
        """Return the ids of a text, and the ids `written` after it. Raises UserError."""
        if not text:
            raise UserError("the prompt is empty; a model can only continue a text")
        if not all(type(i) is int and 0 <= i < self.model.config.vocab_size for i in written):
            raise ValueError("a token id is outside of the vocabulary")
        return [*self.tokenizer.encode(text), *written]

    def idx(self, ids: list[int]) -> Tensor:
        """Return the last block_size ids as the model reads them, (1, T)."""
        device = next(self.model.parameters()).device
        return torch.tensor([ids[-self.model.config.block_size :]], device=device)


def changed_at(path: Path) -> float:
    """Return when a file was last changed, in seconds; 0 if there is no file."""
    return path.stat().st_mtime if path.exists() else 0.0


def digits(x: Tensor) -> list:
    """Return the numbers of `x`, with four digits after the point, in lists."""
    return x.double().round(decimals=4).tolist()


def observe(model: GPT, idx: Tensor, masked: bool = True) -> tuple[list[dict], Tensor]:
    """Return what each layer computes for token ids `idx`, (1, T), and the logits, (T, V).

    input, output    (T, C)       the residual stream before and after the layer
    normed           (T, C)       the input after LayerNorm
    q, k, v          (nh, T, hs)  a query, a key and a value for each head and token
    weights          (nh, T, T)   a row per query; without the mask it also sees later tokens
    attention, mlp   (T, C)       what the two parts add to the stream
    hidden           (T, 4 C)     the MLP's channels after GELU
    """
    layers = [{} for _ in model.transformer.h]
    unseen = iter(layers)

    def plain_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (1, nh, T, T)
        if masked:
            future = torch.ones_like(scores, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(future, -math.inf)
        weights = scores.softmax(dim=-1)
        next(unseen).update(q=q[0], k=k[0], v=v[0], weights=weights[0])
        return weights @ v

    def keep(layer: dict, before: str, after: str):
        return lambda module, args, out: layer.update({before: args[0][0], after: out[0]})

    functions = dict.fromkeys(("attention", "fused_attention"), plain_attention)
    with MODEL_LOCK, torch.no_grad(), patch.multiple("model", **functions), ExitStack() as s:
        for layer, block in zip(layers, model.transformer.h, strict=True):
            block_hook = block.register_forward_hook(keep(layer, "input", "output"))
            attn_hook = block.attn.register_forward_hook(keep(layer, "normed", "attention"))
            mlp_hook = block.mlp.c_proj.register_forward_hook(keep(layer, "hidden", "mlp"))
            for hook in (block_hook, attn_hook, mlp_hook):
                s.enter_context(hook)
        return layers, model(idx)[0][0].float()


class Playground:
    """Answers to the page's requests. `fields` is the JSON object that the page sent.

    Each checkpoint of the runs is loaded at its first use and after a change of its file.
    """

    def __init__(self, out_dirs: list[str], first: str = "ckpt.pt", device="cpu") -> None:
        self.device = device
        names = dict.fromkeys((first, "ckpt.pt", "best.pt"))
        self.paths = {out_dir: [f"{out_dir}/{name}" for name in names] for out_dir in out_dirs}
        self.loaded: dict[str, tuple[float, Loaded]] = {}  # with the time of its file
        self.lock = threading.Lock()

    def find(self) -> dict[str, list[str]]:
        """Return, for each run, the paths of the checkpoints that exist now."""
        return {run: [p for p in paths if Path(p).is_file()] for run, paths in self.paths.items()}

    def load(self, path: str) -> Loaded:
        """Return the checkpoint as it is on the disk now. Raises UserError."""
        if not any(path in paths for paths in self.paths.values()):
            raise UserError(f"{path or 'no checkpoint yet'}: choose a checkpoint of a run")
        with self.lock:
            version = changed_at(Path(path))
            if path not in self.loaded or self.loaded[path][0] != version:
                model, tokenizer, checkpoint = load_model(path)
                model.to(self.device).eval()
                start = checkpoint.train_config.get("sample_start", "\n")
                self.loaded[path] = version, Loaded(model, tokenizer, checkpoint.step, start)
            return self.loaded[path][1]

    def answer(self, action: str, fields: dict) -> Iterator[dict]:
        """Yield the answers of an action. If it fails, the last one is {"error": the reason}."""
        try:
            with explain_out_of_memory():
                yield from getattr(self, action)(fields)
        except (UserError, OSError) as error:
            yield {"error": str(error)}
        except (LookupError, TypeError, ValueError):
            yield {"error": "the request does not have the fields that this action needs"}

    def runs(self, fields: dict) -> Iterator[dict]:
        """The checkpoints of each run, and the run whose log changed last."""
        runs = self.find()
        newest = max(runs, key=lambda run: changed_at(Path(run, "log.jsonl")))
        yield {"runs": runs, "newest": newest}

    def write(self, fields: dict) -> Iterator[dict]:
        """The facts, then each token that sample.py writes with these options and dtype=float32.

        To go on with a text, `written` has the ids of its tokens after the prompt. A text written
        in parts is the text written at once: the random numbers of the parts before are skipped.
        """
        loaded, written = self.load(fields["checkpoint"]), fields["written"]
        values = {"start": loaded.start} | fields["options"]
        start = values.pop("start")  # as it is: an argument of ~/ would become the home folder
        ids = loaded.encode(start, written)
        options = read_options(SampleConfig, [f"--{key}={value}" for key, value in values.items()])
        yield loaded.facts() | {"prompt": start, "count": len(ids) - len(written)}
        model, idx, last = loaded.model, loaded.idx(ids), {}
        sampling = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p")}
        generator = torch.Generator(idx.device).manual_seed(options.seed)
        V = model.config.vocab_size
        weights = torch.ones(1, min(options.top_k or V, V), device=idx.device)
        for _ in written:
            torch.multinomial(weights, 1, generator=generator)
        stream = model.generate(idx, options.max_new_tokens, generator=generator, **sampling)
        while True:
            hook = model.register_forward_hook(lambda model, args, out: last.update(logits=out[0]))
            with MODEL_LOCK, torch.no_grad(), hook:
                token = next(stream, None)
            if token is None or token.item() == getattr(loaded.tokenizer, "end_of_text", None):
                return
            p = last["logits"][0, -1].float().softmax(dim=-1)[token.item()]
            yield {**loaded.tokens([token.item()])[0], "p": p.item()}

    def look(self, fields: dict) -> Iterator[dict]:
        """What the model computed before token `id` followed a text and the ids `written`.

        The logits, largest first; the ten best candidates and the token itself; the most likely
        tokens after each layer; the attention of the last token in each head; and, for the last
        eight tokens, the values of `observe` in one layer and one head.
        """
        loaded = self.load(fields["checkpoint"])
        idx = loaded.idx(loaded.encode(fields["text"], fields["written"]))
        layers, logits = observe(loaded.model, idx)
        order = logits[-1].argsort(descending=True).tolist()
        shown = loaded.tokens(dict.fromkeys([*order[:10], fields["id"]]))
        # The logit lens: the final LayerNorm and the head read the state after each layer as they
        # read the last one (nostalgebraist 2020, "interpreting GPT: the logit lens", LessWrong).
        states = torch.stack([layer["output"][-1] for layer in layers])  # (n_layer, C)
        with torch.no_grad():
            lens = loaded.model.lm_head(loaded.model.transformer.ln_f(states))[:, : len(order)]
        best = lens.softmax(dim=-1).topk(min(3, len(order)))
        layer, head = layers[fields["layer"]], fields["head"]
        values = {name: x if x.dim() == 2 else x[head] for name, x in layer.items()}
        yield {
            "logits": digits(logits[-1, order]),
            "candidates": [token | {"rank": order.index(token["id"]) + 1} for token in shown],
            "lens": [
                [token | {"p": p} for token, p in zip(loaded.tokens(ids), row, strict=True)]
                for ids, row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ],
            "rows": [digits(layer["weights"][:, -1]) for layer in layers],
            "context": loaded.tokens(idx[0].tolist()),
            "values": {name: digits(x[-8:]) for name, x in values.items()},
        }

    def read(self, fields: dict) -> Iterator[dict]:
        """The first `count` tokens of a text and the ids `written`, and their losses.

        With `maps` also the attention weights. Without `masked`, tokens also look at later ones.
        """
        loaded = self.load(fields["checkpoint"])
        ids = loaded.encode(fields["text"], fields["written"])
        limit = loaded.model.config.block_size
        idx = loaded.idx(ids[: max(1, min(fields["count"], limit))])
        layers, logits = observe(loaded.model, idx, fields["masked"])
        yield {
            "tokens": loaded.tokens(idx[0].tolist()),
            "losses": cross_entropy(logits[:-1], idx[0, 1:], reduction="none").tolist(),
            "weights": [digits(layer["weights"]) for layer in layers if fields["maps"]],
            "count": len(ids),
        }

    def log(self, fields: dict) -> Iterator[dict]:
        """The records in the log of a run; nothing if the page has this version of the log."""
        run = fields["run"]
        if run not in self.paths:
            raise UserError(f"{run}: not a run of this page")
        version = changed_at(Path(run, "log.jsonl"))
        if version == 0 or version != fields["version"]:
            yield {"version": version, "records": read_log(Path(run, "log.jsonl"))}


class Server(ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = os.name == "posix"  # on Windows, two servers could share the port

    def __init__(self, playground: Playground, port: int, host: str = LOCAL[0]) -> None:
        self.playground, self.hosts = playground, (*LOCAL, host.lower())
        super().__init__((LOCAL[0] if host in LOCAL else "", port), Handler)  # "": any address

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
        if len(hosts) != 1 or re.sub(r":\d+\Z", "", hosts[0].lower()) not in self.server.hosts:
            return "open the page as http://127.0.0.1 or http://localhost, or set --host"
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
    playground = Playground(out_dirs, config.checkpoint, device)
    if config.to:
        loaded = playground.load(f"{out_dirs[0]}/{config.checkpoint}")
        logs = playground.answer("log", {"run": out_dirs[0], "version": None})
        facts = loaded.facts() | {"records": [r for log in logs for r in log.get("records", [])]}
        return write_page(Path(config.to), loaded.model, loaded.tokenizer, facts, config.weights)
    for out_dir, paths in playground.find().items():
        if not paths:
            print(f"{out_dir}: no checkpoint yet; the page offers it when it exists")
    try:
        server = Server(playground, config.port, config.host)
    except OSError as error:
        raise UserError(f"port {config.port}: {error.strerror}; choose another --port") from None
    print(f"open http://{config.host}:{config.port} in a browser; Ctrl-C ends the program", flush=1)
    with server:
        server.serve_forever()


if __name__ == "__main__":
    run(main, configure(PlaygroundConfig))
