"""Print the loss, the perplexity and the bits per byte of a model on a file.

    python -m tools.evaluate --out_dir=out/phase1_char             # val.bin of the run's data set
    python -m tools.evaluate --init_from=gpt2 --data=my.txt --stride=512

A window slides over the file (https://huggingface.co/docs/transformers/perplexity). A file's first
token has no context, so it is not predicted and its bytes do not count: the loss on val.bin is the
validation loss of training. A .txt gets an <|endoftext|> in front, if the tokenizer has one, so its
whole text is predicted. <|endoftext|> itself is predicted too, and has 0 bytes.

Use --dtype=float32 to compare with published numbers. Benchmarks such as HellaSwag and LAMBADA run
on an exported model: tools.export writes a folder that lm-evaluation-harness reads.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

from configurator import UserError, check_range, configure, run
from support import runtime
from support.data import open_tokens, read_meta
from support.files import read_text
from support.hub import load_model
from support.tokenizer import END_OF_TEXT, Tokenizer


@dataclass(frozen=True)
class EvaluateConfig:
    """Score a model on a file: prints a table, then the same as JSON."""

    # model
    out_dir: str = "out/phase1_char"  # folder of the run
    checkpoint: str = "ckpt.pt"  # ckpt.pt: the last state; best.pt: the lowest loss
    init_from: str = "resume"  # a run's model; or gpt2, gpt2-xl, owner/name, a folder
    # data
    data: str = ""  # .txt or .bin; empty: val.bin of the run's data set
    stride: int = 0  # tokens from one window to the next; 0: block_size
    # computation
    batch_size: int = 8  # windows in one forward pass
    device: str = "auto"  # cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matrix products

    def __post_init__(self) -> None:
        check_range(self, 0, 10**9, "stride")
        check_range(self, 1, 10**9, "batch_size")


def read_tokens(path: Path, tokenizer: Tokenizer, sha256: dict | None = None) -> np.ndarray:
    """Return the token ids of a .txt, or of a .bin with these checksums; the first is context."""
    if path.suffix.lower() == ".txt":
        text, end = read_text(path), getattr(tokenizer, "end_of_text", None)
        if end is None:
            return np.array(tokenizer.encode(text), dtype=np.int64)
        return np.array([end, *tokenizer.encode(text.removeprefix(END_OF_TEXT))])
    if path.suffix != ".bin" or not path.is_file():
        raise UserError(f"{path}: not a .txt or .bin file; choose another with --data")
    meta = path.with_name("meta.json")
    if meta.exists() and read_meta(meta)["tokenizer"] != tokenizer.to_dict():
        raise UserError(f"{path}: not made with the model's tokenizer; use the text (.txt)")
    if sha256 and sha256 != read_meta(meta)["sha256"]:
        raise UserError(f"{path}: was prepared again after this run; name it with --data to use it")
    return open_tokens(path, tokenizer.vocab_size).open()


def count_bytes(tokenizer: Tokenizer, ids: np.ndarray) -> int:
    """Return the UTF-8 bytes of the text behind `ids`; special tokens have none."""
    lengths = np.array([len(tokenizer.decode_bytes([i])) for i in range(tokenizer.vocab_size)])
    lengths[list(getattr(tokenizer, "special", {}).values())] = 0
    return sum(int(lengths[part].sum()) for part in np.array_split(ids, len(ids) // 2**20 + 1))


def batches(ids: np.ndarray, T: int, stride: int, batch_size: int) -> Iterator:
    """Yield inputs x and targets y, (B, T) int64 each: every id but the first is a target once.

    The first window has T targets. Each later one starts `stride` ids further on, and its targets
    are the ids that come after the window before. Other places in y are -1.
    """
    starts = np.arange(0, max(len(ids) - 1 - T, 0) + stride, stride)
    for i in tqdm(range(0, len(starts), batch_size), leave=False, disable=None):
        positions = starts[i : i + batch_size, None] + np.arange(T + 1)  # (B, T + 1)
        windows = ids[np.minimum(positions, len(ids) - 1)].astype(np.int64)
        y = np.where(positions[:, 1:] < len(ids), windows[:, 1:], -1)
        y[int(i == 0) :, : T - stride] = -1
        yield torch.from_numpy(windows[:, :-1].copy()), torch.from_numpy(y)


@runtime.explain_out_of_memory()
def main(config: EvaluateConfig) -> None:
    """Print the figures of a model on a file."""
    device = runtime.resolve_device(config.device)
    dtype = runtime.resolve_dtype(config.dtype, device)
    saved = str(Path(config.out_dir, config.checkpoint))
    name = saved if config.init_from == "resume" else config.init_from
    model, tokenizer, checkpoint = load_model(name)
    T, data = model.config.block_size, config.data
    if not data and checkpoint is None:
        raise UserError(f"init_from={name} has no val.bin; name a .txt or .bin with --data")
    data = data or str(Path("data", checkpoint.train_config["dataset"], "val.bin"))
    if (stride := config.stride or T) > T:
        raise UserError(f"stride is {stride} but must be at most {T}, the model's block_size")
    ids = read_tokens(Path(data), tokenizer, None if config.data else checkpoint.dataset)
    n_tokens, n_bytes = len(ids) - 1, count_bytes(tokenizer, ids[1:])
    if n_bytes == 0:
        raise UserError(f"{data}: has no text to predict; use a longer file")
    model.to(device).eval()
    runtime.keep_freed_memory()
    nats = 0.0
    with torch.no_grad(), runtime.autocast(device, dtype):
        for x, y in batches(ids, T, stride, config.batch_size):
            logits, y = model(x.to(device))[0].float().flatten(0, 1), y.to(device).flatten()
            losses = F.cross_entropy(logits, y, ignore_index=-1, reduction="none")
            nats += losses.cpu().double().sum().item()
    if not math.isfinite(nats):
        raise UserError("the loss is not finite: damaged weights, or try --dtype=float32")
    loss, bits_per_byte = nats / n_tokens, nats / math.log(2) / n_bytes
    result = {"model": name, "dtype": runtime.dtype_name(dtype), "data": data, "stride": stride}
    result |= {"tokens": n_tokens, "bytes": n_bytes}
    result |= {"loss": loss, "perplexity": float(np.exp(loss)), "bits_per_byte": bits_per_byte}
    for key, value in result.items():
        print(f"{key:15} {f'{value:.4f}' if isinstance(value, float) else value}")
    print(json.dumps(result))


if __name__ == "__main__":
    run(main, configure(EvaluateConfig))
