"""Score a model: on every token of a file, or on the questions of HellaSwag or LAMBADA.

    python evaluate.py --out_dir=out/phase1_char                           # val.bin of its data set
    python evaluate.py --init_from=gpt2 --data=my.txt --stride=512
    python evaluate.py --init_from=gpt2 --task=hellaswag                   # downloaded once, to data/cache/
    python evaluate.py --out_dir=out/phase2_bpe --task=lambada --data=lambada_test.jsonl

A file is scored by a window that slides over it (https://huggingface.co/docs/transformers/perplexity).
Its first token has nothing it could be predicted from: it is context, and neither it nor its bytes
count. In a .bin that is the first id, so that the loss is the validation loss of training. A text in
byte pair encoding gets an <|endoftext|> in front, as documents have in training, and all of its own
tokens are predicted; a text in characters loses its first. <|endoftext|> is predicted too, for 0 bytes.

The tasks are `hellaswag` and `lambada_openai` of lm-evaluation-harness, without examples in the prompt
(https://github.com/EleutherAI/lm-evaluation-harness). Their figures hang on details of the text and
of what is counted, and these are the harness's. To compare with others, add --dtype=float32.
"""

from dataclasses import dataclass
from typing import Literal

from configurator import UserError, configure, run


@dataclass(frozen=True)
class EvaluateConfig:
    """Score a model on a file, or on HellaSwag or LAMBADA: a table, and the same as a line of JSON."""

    # the model
    out_dir: str = "out/phase1_char"  # the run's folder
    checkpoint: str = "ckpt.pt"  # the file in it: ckpt.pt is the last state, best.pt the best
    init_from: str = (
        "resume"  # resume: a run's model; or a pretrained one: gpt2, gpt2-xl, owner/name, a folder
    )
    # what it is scored on
    task: Literal["", "hellaswag", "lambada"] = (
        ""  # hellaswag, lambada; empty: loss and bits per byte of a file
    )
    data: str = ""  # file or URL: .txt or .bin (by default the run's val.bin), or the task's .jsonl (its own URL)
    stride: int = (
        0  # tokens from one window to the next; fewer give each more context; 0: block_size
    )
    limit: int = 0  # take the first so many examples of the task; 0: all
    # how
    batch_size: int = 8  # windows, or sequences, in one forward pass
    device: str = "auto"  # cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the matrix products

    def __post_init__(self) -> None:
        for name, lowest in (("stride", 0), ("limit", 0), ("batch_size", 1)):
            if getattr(self, name) < lowest:
                raise UserError(f"{name} is {getattr(self, name)} but must be at least {lowest}")
        if self.stride and self.task:
            raise UserError(
                f"stride={self.stride} is for files; --task={self.task} has no windows, leave it out"
            )
        if self.limit and not self.task:
            raise UserError(
                f"limit={self.limit} is for tasks; a file is scored whole, so leave it out or add --task"
            )


if __name__ == "__main__":  # before torch is imported, so that --help and mistakes answer at once
    config = configure(EvaluateConfig)

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from model import GPT
from support import runtime, tokenizer
from support.checkpoint import load_checkpoint
from support.data import TOKEN, read_meta, scan
from support.download import download
from support.hub import load_pretrained
from support.tokenizer import BPETokenizer, Tokenizer

URLS = {
    "hellaswag": "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl",
    "lambada": "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl",
}


@torch.no_grad()
def score(
    model: GPT, sequences: Iterable[tuple[np.ndarray, int]], batch_size: int
) -> Iterator[tuple[float, bool]]:
    """Of each (ids, n): log p in nats of its last n ids after those before, and whether each is the likeliest there.

    Of more than block_size + 1 ids the last ones are taken.
    """
    T, device = model.config.block_size, model.lm_head.weight.device
    sequences = iter(sequences)
    while batch := list(islice(sequences, batch_size)):
        length = min(T, max(len(ids) for ids, _ in batch) - 1)
        x = torch.zeros(
            len(batch), length, dtype=torch.int64
        )  # filled up on the right, which nothing before it sees
        y = torch.full_like(x, -1)
        for row, (ids, n) in enumerate(batch):
            ids = torch.tensor(ids[-T - 1 :])
            end = len(ids) - 1
            x[row, :end], y[row, end - n : end] = ids[:-1], ids[-n:]
        x, y = x.to(device), y.to(device)
        logits = model(x)[0].float()  # (B, T, V)
        losses = F.cross_entropy(
            logits.flatten(0, 1), y.flatten(), ignore_index=-1, reduction="none"
        ).view_as(y)
        if not losses.isfinite().all():
            raise UserError(
                "the loss is not finite: the weights are damaged, or overflow; try --dtype=float32"
            )
        likeliest = (logits.argmax(dim=-1) == y) | (y == -1)
        yield from zip(
            (-losses).cpu().double().sum(dim=1).tolist(), likeliest.all(dim=1).tolist(), strict=True
        )


# Loss, perplexity and bits per byte of a file


def read_tokens(path: Path, tok: Tokenizer) -> np.ndarray:
    """The ids of a .txt, or of a .bin without reading it whole; the first is context alone. Raises UserError."""
    if path.suffix == ".txt":
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: byte {error.start} is not UTF-8; convert the file") from None
        if isinstance(tok, BPETokenizer):
            return np.roll(
                tok.encode_document(text), 1
            )  # the <|endoftext|> from its end to its front
        return np.array(tok.encode(text), dtype=np.int64)
    if path.suffix != ".bin":
        raise UserError(
            f"{path}: unknown kind of file; it must end with .txt or .bin, or have its --task named"
        )
    meta, size = path.with_name("meta.json"), path.stat().st_size
    if meta.exists() and read_meta(meta)["tokenizer"] != tok.to_dict():
        raise UserError(
            f"{path}: {meta} has another tokenizer than the model; give the text itself, as a .txt"
        )
    if size == 0 or size % TOKEN.itemsize:
        raise UserError(
            f"{path}: {size} bytes are no uint16 ids, the file is empty or cut; copy it again"
        )
    largest = scan(path)[1]
    if largest >= tok.vocab_size:
        raise UserError(
            f"{path}: token id {largest} is beyond the model's vocabulary of {tok.vocab_size}"
        )
    return np.memmap(path, dtype=TOKEN, mode="r")


def count_bytes(tok: Tokenizer, ids: np.ndarray) -> int:
    """Bytes of the text behind `ids`; <|endoftext|>, which stands between texts, has none."""
    lengths = np.array([len(tok.decode_bytes([i])) for i in range(tok.vocab_size)])
    if isinstance(tok, BPETokenizer):
        lengths[tok.end_of_text] = 0
    return sum(int(lengths[ids[i : i + (1 << 20)]].sum()) for i in range(0, len(ids), 1 << 20))


def windows(ids: np.ndarray, T: int, stride: int) -> Iterator[tuple[np.ndarray, int]]:
    """Windows for `score`, in which every id but the first is predicted exactly once.

    The first window predicts T ids. Each later one stands `stride` further on, and predicts the
    `stride` ids (in the last window what is left of them) that the one before did not reach.
    """
    for start in tqdm(
        range(0, max(len(ids) - 1 - T, 0) + stride, stride), leave=False, disable=None
    ):
        window = ids[start : start + T + 1].astype(np.int64)
        yield window, len(window) - 1 - (T - stride if start else 0)


def evaluate_file(model: GPT, tok: Tokenizer, path: Path, config: EvaluateConfig) -> dict:
    T = model.config.block_size
    stride = config.stride or T
    if stride > T:
        raise UserError(
            f"stride is {stride} but must be at most {T}, the model's block_size, to leave no token out"
        )
    ids = read_tokens(path, tok)
    n_tokens, n_bytes = len(ids) - 1, count_bytes(tok, ids[1:])
    if n_bytes == 0:
        raise UserError(f"{path}: there is no text in it to predict; give a longer file")
    nats = -sum(log_p for log_p, _ in score(model, windows(ids, T, stride), config.batch_size))
    return {
        "stride": stride,
        "tokens": n_tokens,
        "bytes": n_bytes,
        "loss": nats / n_tokens,
        "perplexity": float(np.exp(nats / n_tokens)),
        "bits_per_byte": nats / math.log(2) / n_bytes,
    }


# HellaSwag and LAMBADA: a context, what may follow it after a space, and which of these does

Example = tuple[str, list[str], int]


def hellaswag(fields: dict) -> Example:
    """Zellers et al. 2019 (https://arxiv.org/abs/1905.07830): which of four endings is the right one?"""
    context = (
        f"{fields['activity_label']}: {fields['ctx_a']} {fields.get('ctx_b', '').capitalize()}"
    )
    endings, right = [clean(ending) for ending in fields["endings"]], int(fields["label"])
    if not 0 <= right < len(endings) or not all(endings):
        raise ValueError
    return clean(context), endings, right


def clean(text: str) -> str:
    """Without WikiHow's marks, as [title], [step] and [substeps]."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def lambada(fields: dict) -> Example:
    """Paperno et al. 2016 (https://arxiv.org/abs/1606.06031): which word is the last one?"""
    context, _, word = fields["text"].rpartition(" ")
    if not context.strip():
        raise ValueError
    return context, [word], 0


def read_examples(path: Path, task: str, limit: int) -> list[Example]:
    """The first `limit` lines of the task's jsonl; 0: all. Raises UserError, with the line."""
    parse, examples = {"hellaswag": hellaswag, "lambada": lambada}[task], []
    with open(path, "rb") as file:
        for number, line in enumerate(islice(file, limit or None), start=1):
            try:
                examples.append(parse(json.loads(line)))
            except KeyError as error:
                raise UserError(
                    f"{path}: line {number} has no {error}; is it a .jsonl file of {task}?"
                ) from None
            except (ValueError, TypeError, AttributeError, RecursionError):
                raise UserError(
                    f"{path}: line {number} is no example of {task} in JSON; remove or mend it"
                ) from None
    if not examples:
        raise UserError(f"{path}: there is no example in it; give a .jsonl file of {task}")
    return examples


def encode_pair(tok: Tokenizer, context: str, continuation: str) -> tuple[list[int], int]:
    """The ids of both together, and how many of them are the continuation's.

    Space at the end of the context belongs to the continuation: a word's token begins with its space.
    """
    ids = tok.encode(context + continuation)
    return ids, len(ids) - len(tok.encode(context.rstrip()))


def evaluate_task(model: GPT, tok: Tokenizer, path: Path, config: EvaluateConfig) -> dict:
    examples = read_examples(path, config.task, config.limit)
    pairs = [
        encode_pair(tok, context, " " + choice)
        for context, choices, _ in examples
        for choice in choices
    ]
    T, longest = model.config.block_size, max(n for _, n in pairs)
    if longest > T:
        raise UserError(
            f"{path}: an answer has {longest} tokens, more than the model's block_size of {T}"
        )
    scores = score(model, tqdm(pairs, leave=False, disable=None), config.batch_size)
    if config.task == "lambada":
        log_p, greedy = zip(*scores, strict=True)
        return {
            "examples": len(examples),
            **accuracy("acc", greedy),
            "perplexity": float(np.exp(-np.mean(log_p))),
        }
    hits, hits_norm = [], []
    for _, choices, right in examples:
        log_p = np.array([log_p for log_p, _ in islice(scores, len(choices))])
        hits.append(log_p.argmax() == right)
        hits_norm.append(
            (log_p / [len(choice) for choice in choices]).argmax() == right
        )  # per character
    return {"examples": len(examples), **accuracy("acc", hits), **accuracy("acc_norm", hits_norm)}


def accuracy(name: str, hits: Sequence[bool]) -> dict:
    """The share of hits, and its standard error: the sample's standard deviation over the root of n."""
    n, p = len(hits), float(np.mean(hits))
    return {name: p, f"{name}_stderr": math.sqrt(p * (1 - p) / max(n - 1, 1))}


# From the options to the figures


def load_model(config: EvaluateConfig) -> tuple[GPT, Tokenizer, str]:
    """The model, its tokenizer, and the val.bin of its run, if it is from one."""
    if config.init_from != "resume":
        return *load_pretrained(config.init_from), ""
    model, checkpoint = load_checkpoint(Path(config.out_dir) / config.checkpoint)
    val = Path("data") / checkpoint["train_config"]["dataset"] / "val.bin"
    return model, tokenizer.from_dict(checkpoint["tokenizer"]), str(val)


def find_file(data: str) -> Path:
    """The file that a path or a URL names; what a URL names is downloaded unless data/cache/ has it."""
    path = Path(data)
    if data.startswith(("http://", "https://")):
        path = Path("data") / "cache" / re.sub(r"[^\w.-]+", "_", data.partition("://")[2])
        if not path.exists():
            download(data, path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; name another with --data")
    return path


def main(config: EvaluateConfig) -> None:
    device = runtime.resolve_device(config.device)
    dtype = runtime.resolve_dtype(config.dtype, device)
    model, tok, val = load_model(config)
    model.to(device).eval()
    if device.type == "cpu":
        runtime.keep_freed_memory()
    data = config.data or URLS.get(config.task, val)
    if not data:
        raise UserError(
            f"init_from={config.init_from} has no data set of its own; name a .txt or .bin with --data"
        )
    evaluate = evaluate_task if config.task else evaluate_file
    with runtime.autocast(device, dtype):
        figures = evaluate(model, tok, find_file(data), config)
    name = (
        config.init_from
        if config.init_from != "resume"
        else str(Path(config.out_dir) / config.checkpoint)
    )
    result = {
        "model": name,
        "dtype": runtime.dtype_name(dtype),
        "task": config.task or "file",
        "data": data,
        **figures,
    }
    for key, value in result.items():
        print(f"{key:15} {f'{value:.4f}' if isinstance(value, float) else value}")
    print(json.dumps(result))


if __name__ == "__main__":
    run(main, config)
