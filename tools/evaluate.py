"""Score a model: its loss on every token of a file, or its answers to HellaSwag or LAMBADA.

    python -m tools.evaluate --out_dir=out/phase1_char             # val.bin of the run's data set
    python -m tools.evaluate --init_from=gpt2 --data=my.txt --stride=512
    python -m tools.evaluate --init_from=gpt2 --task=hellaswag     # downloads the questions once
    python -m tools.evaluate --out_dir=out/phase2_bpe --task=lambada --data=lambada_test.jsonl

A window slides over the file (https://huggingface.co/docs/transformers/perplexity). A file's first
token has no context, so it is not predicted and its bytes do not count: the loss on val.bin is the
validation loss of training. A .txt gets an <|endoftext|> in front, if the tokenizer has one, so its
whole text is predicted. <|endoftext|> itself is predicted too, and has 0 bytes.

The tasks are `hellaswag` and `lambada_openai` of https://github.com/EleutherAI/lm-evaluation-harness
without examples in the prompt. Use --dtype=float32 to compare with published numbers.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from configurator import UserError, check_range, configure, run
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from model import GPT
from support import runtime
from support.data import TOKEN, inspect_bin, read_meta
from support.download import download
from support.files import read_text
from support.hub import load_model
from support.tokenizer import BPETokenizer, Tokenizer

URLS = {
    "hellaswag": "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl",
    "lambada": "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl",
}
Example = tuple[str, list[str], int]  # context, possible continuations, index of the right one


@dataclass(frozen=True)
class EvaluateConfig:
    """Score a model on a file, HellaSwag or LAMBADA: prints a table, then the same as JSON."""

    # model
    out_dir: str = "out/phase1_char"  # folder of the run
    checkpoint: str = "ckpt.pt"  # ckpt.pt: the last state; best.pt: the lowest loss
    init_from: str = "resume"  # a run's model; or gpt2, gpt2-xl, owner/name, a folder
    # data
    task: Literal["", "hellaswag", "lambada"] = ""  # hellaswag, lambada; empty: score a file
    data: str = ""  # .txt, .bin or .jsonl, or a URL; empty: val.bin, or task's
    stride: int = 0  # tokens from one window to the next; 0: block_size
    limit: int = 0  # use the first examples of a task only; 0: all
    # computation
    batch_size: int = 8  # sequences in one forward pass
    device: str = "auto"  # cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matrix products

    def __post_init__(self) -> None:
        check_range(self, 0, 10**9, "stride", "limit")
        check_range(self, 1, 10**9, "batch_size")
        if self.stride and self.task:
            raise UserError(f"stride={self.stride} is for files; leave it out with --task")
        if self.limit and not self.task:
            raise UserError(f"limit={self.limit} is for tasks; leave it out, or add --task")


@torch.no_grad()
def score(model: GPT, sequences: Iterable, batch_size: int) -> Iterator[tuple[float, bool]]:
    """For each (ids, n), yield ln p of the last n ids, and whether greedy decoding gives them."""
    T, device = model.config.block_size, model.lm_head.weight.device
    sequences = iter(sequences)
    while batch := list(islice(sequences, batch_size)):
        length = min(T, max(len(ids) for ids, _ in batch) - 1)
        x = torch.zeros(len(batch), length, dtype=torch.int64)  # (B, T), padded on the right,
        y = torch.full_like(x, -1)  # where no earlier token sees it; -1: not scored
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
            raise UserError("the loss is not finite: damaged weights, or try --dtype=float32")
        greedy = ((logits.argmax(dim=-1) == y) | (y == -1)).all(dim=1)
        yield from zip((-losses).cpu().double().sum(dim=1).tolist(), greedy.tolist(), strict=True)


def read_tokens(path: Path, tokenizer: Tokenizer) -> np.ndarray:
    """Return the token ids of a .txt or .bin file; the first one is context only."""
    if path.suffix == ".txt":
        text = read_text(path)
        if isinstance(tokenizer, BPETokenizer):
            return np.roll(tokenizer.encode_document(text), 1)  # <|endoftext|> moves to the front
        return np.array(tokenizer.encode(text), dtype=np.int64)
    if path.suffix != ".bin":
        raise UserError(f"{path}: must end in .txt or .bin; a .jsonl needs its --task")
    meta, size = path.with_name("meta.json"), path.stat().st_size
    if meta.exists() and read_meta(meta)["tokenizer"] != tokenizer.to_dict():
        raise UserError(f"{path}: not made with the model's tokenizer; use the text (.txt)")
    if size == 0 or size % TOKEN.itemsize:
        raise UserError(f"{path}: {size} bytes are not uint16 token ids; copy the file again")
    largest, V = inspect_bin(path)[1], tokenizer.vocab_size
    if largest >= V:
        raise UserError(f"{path}: token id {largest} is not one of the model's {V}; use the text")
    return np.memmap(path, dtype=TOKEN, mode="r")


def count_bytes(tokenizer: Tokenizer, ids: np.ndarray) -> int:
    """Return the UTF-8 bytes of the text behind `ids`; <|endoftext|> has none."""
    lengths = np.array([len(tokenizer.decode_bytes([i])) for i in range(tokenizer.vocab_size)])
    if isinstance(tokenizer, BPETokenizer):
        lengths[tokenizer.end_of_text] = 0
    return sum(int(lengths[part].sum()) for part in np.array_split(ids, len(ids) // 2**20 + 1))


def windows(ids: np.ndarray, T: int, stride: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yield windows for `score` that predict every id but the first exactly once.

    The first predicts T ids; each later one starts `stride` ids further on and predicts the rest.
    """
    starts = range(0, max(len(ids) - 1 - T, 0) + stride, stride)
    for start in tqdm(starts, leave=False, disable=None):
        window = ids[start : start + T + 1].astype(np.int64)
        yield window, len(window) - 1 - (T - stride if start else 0)


def evaluate_file(model: GPT, tokenizer: Tokenizer, path: Path, config: EvaluateConfig) -> dict:
    """Return the loss, the perplexity and the bits per byte of a file."""
    T = model.config.block_size
    stride = config.stride or T
    if stride > T:
        raise UserError(f"stride is {stride} but must be at most {T}, the model's block_size")
    ids = read_tokens(path, tokenizer)
    n_tokens, n_bytes = len(ids) - 1, count_bytes(tokenizer, ids[1:])
    if n_bytes == 0:
        raise UserError(f"{path}: has no text to predict; use a longer file")
    nats = -sum(log_p for log_p, _ in score(model, windows(ids, T, stride), config.batch_size))
    loss, bits_per_byte = nats / n_tokens, nats / math.log(2) / n_bytes
    figures = {"loss": loss, "perplexity": float(np.exp(loss)), "bits_per_byte": bits_per_byte}
    return {"stride": stride, "tokens": n_tokens, "bytes": n_bytes, **figures}


def parse_hellaswag(fields: dict) -> Example:
    """Zellers et al. 2019 (https://arxiv.org/abs/1905.07830): which of four endings is right?"""
    a, b = fields["ctx_a"], fields.get("ctx_b", "").capitalize()
    endings = [clean(ending) for ending in fields["endings"]]
    return clean(f"{fields['activity_label']}: {a} {b}"), endings, int(fields["label"])


def clean(text: str) -> str:
    """Remove WikiHow's marks, such as [title], [step] and [substeps], as the harness does."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def parse_lambada(fields: dict) -> Example:
    """Paperno et al. 2016 (https://arxiv.org/abs/1606.06031): which word is the last one?"""
    context, _, word = fields["text"].rpartition(" ")
    return context, [word], 0


def read_examples(path: Path, task: str, limit: int) -> list[Example]:
    """Return the examples in the first `limit` lines of a task's .jsonl file; 0: all lines."""
    parse, examples = {"hellaswag": parse_hellaswag, "lambada": parse_lambada}[task], []
    with open(path, "rb") as file:
        for number, line in enumerate(islice(file, limit or None), start=1):
            try:
                context, choices, right = parse(json.loads(line))
                if not context.strip() or not all(choices) or not 0 <= right < len(choices):
                    raise ValueError
            except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
                reason = f"has no {error}" if isinstance(error, KeyError) else "is damaged"
                raise UserError(f"{path}: line {number} {reason}; use {task}'s .jsonl") from None
            examples.append((context, choices, right))
    if not examples:
        raise UserError(f"{path}: has no examples; use a .jsonl file of {task}")
    return examples


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], int]:
    """Return the ids of both texts, and how many belong to the second and the spaces before it."""
    ids = tokenizer.encode(context + continuation)
    return ids, len(ids) - len(tokenizer.encode(context.rstrip()))


def evaluate_task(model: GPT, tokenizer: Tokenizer, path: Path, config: EvaluateConfig) -> dict:
    """Return the accuracy on a task, and for LAMBADA the perplexity of the last word."""
    examples, T = read_examples(path, config.task, config.limit), model.config.block_size
    pairs = [encode_pair(tokenizer, a, f" {b}") for a, choices, _ in examples for b in choices]
    if (longest := max(n for _, n in pairs)) > T:
        raise UserError(f"{path}: an answer has {longest} tokens, but block_size is {T}")
    scores = score(model, tqdm(pairs, leave=False, disable=None), config.batch_size)
    if config.task == "lambada":
        log_p, greedy = zip(*scores, strict=True)
        perplexity = float(np.exp(-np.mean(log_p)))
        return {"examples": len(examples), **accuracy("acc", greedy), "perplexity": perplexity}
    hits, hits_norm = [], []  # with the log-probability of an ending, and with that per character
    for _, choices, right in examples:
        log_p = np.array([log_p for log_p, _ in islice(scores, len(choices))])
        hits.append(log_p.argmax() == right)
        hits_norm.append((log_p / [len(choice) for choice in choices]).argmax() == right)
    return {"examples": len(examples), **accuracy("acc", hits), **accuracy("acc_norm", hits_norm)}


def accuracy(name: str, hits: Sequence[bool]) -> dict:
    """Return the share of hits and its standard error."""
    n, p = len(hits), float(np.mean(hits))
    return {name: p, f"{name}_stderr": math.sqrt(p * (1 - p) / max(n - 1, 1))}


def find_file(data: str) -> Path:
    """Return the file that a path or a URL names. A URL is downloaded once, into data/cache/."""
    path = Path(data)
    if data.startswith(("http://", "https://")):
        path = Path("data") / "cache" / re.sub(r"[^\w.-]+", "_", data.partition("://")[2])
        if not path.exists():
            download(data, path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; choose another with --data")
    return path


@runtime.explain_out_of_memory()
def main(config: EvaluateConfig) -> None:
    device = runtime.resolve_device(config.device)
    dtype = runtime.resolve_dtype(config.dtype, device)
    model, tokenizer, state = load_model(config.init_from, config.out_dir, config.checkpoint)
    model.to(device).eval()
    runtime.keep_freed_memory()
    name = config.init_from if state is None else str(Path(config.out_dir) / config.checkpoint)
    val = "" if state is None else str(Path("data") / state["train_config"]["dataset"] / "val.bin")
    data = config.data or URLS.get(config.task, val)
    if not data:
        raise UserError(f"init_from={name} has no val.bin; name a .txt or .bin with --data")
    evaluate = evaluate_task if config.task else evaluate_file
    with runtime.autocast(device, dtype):
        figures = evaluate(model, tokenizer, find_file(data), config)
    about = {"model": name, "dtype": runtime.dtype_name(dtype), "task": config.task or "file"}
    result = {**about, "data": data, **figures}
    for key, value in result.items():
        print(f"{key:15} {f'{value:.4f}' if isinstance(value, float) else value}")
    print(json.dumps(result))


if __name__ == "__main__":
    run(main, configure(EvaluateConfig))
