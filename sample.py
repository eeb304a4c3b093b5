"""Print text that a trained model writes.

python sample.py --out_dir=out/phase1_char --start="ROMEO:" --temperature=0.8
python sample.py --init_from=gpt2-xl --start="The answer to life is"
"""

from dataclasses import dataclass
from typing import Literal

from configurator import UserError, configure, run


@dataclass(frozen=True)
class SampleConfig:
    """Print text that a trained model writes, as it writes it."""

    init_from: str = (
        "resume"  # resume: a run's model; or a pretrained one: gpt2, gpt2-xl, owner/name, a folder
    )
    out_dir: str = "out/phase1_char"  # the run's folder
    checkpoint: str = "ckpt.pt"  # the file in it: ckpt.pt is the last state, best.pt the best
    start: str = "\n"  # the prompt; FILE:path reads it from a file
    num_samples: int = 1  # how many texts
    max_new_tokens: int = 500  # tokens in each
    temperature: float = 0.8  # divides the logits; 0 takes the likeliest token each time
    top_k: int | None = None  # draw from the k likeliest tokens only
    top_p: float | None = (
        None  # draw from the likeliest tokens that together reach this probability
    )
    stop: str = (
        "<|endoftext|>"  # a text ends where this has been written; empty: at max_new_tokens only
    )
    seed: int = 1337  # the same seed writes the same texts
    device: str = "auto"  # cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the weights
    compile: bool | Literal["auto"] = (
        "auto"  # torch.compile the model; auto: no, it takes longer than most texts
    )

    def __post_init__(self) -> None:
        for name, lowest in (("num_samples", 1), ("max_new_tokens", 1), ("temperature", 0)):
            if getattr(self, name) < lowest:
                raise UserError(f"{name} is {getattr(self, name)} but must be at least {lowest}")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k} but must be at least 1")
        if not 0 <= self.seed < 1 << 63:
            raise UserError(f"seed is {self.seed} but must be at least 0 and below 2 ** 63")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p} but must be above 0 and at most 1")


if __name__ == "__main__":  # before torch is imported, so that --help and mistakes answer at once
    config = configure(SampleConfig)

import codecs
import sys
from pathlib import Path

import torch

from support import runtime, tokenizer
from support.checkpoint import load_checkpoint
from support.hub import load_pretrained


def read_start(start: str) -> str:
    """The prompt that --start gives, in itself or as FILE:path."""
    if start.startswith("FILE:"):
        try:
            start = Path(start.removeprefix("FILE:")).read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"start={start}: byte {error.start} is not UTF-8; convert the file"
            ) from None
    if not start:
        raise UserError("start is empty, and a model can only go on from something; try --start=A")
    return start


def main(config: SampleConfig) -> None:
    device = runtime.resolve_device(config.device)
    dtype = runtime.resolve_dtype(config.dtype, device)
    if config.init_from == "resume":
        model, checkpoint = load_checkpoint(Path(config.out_dir) / config.checkpoint)
        tok = tokenizer.from_dict(checkpoint["tokenizer"])
    else:
        model, tok = load_pretrained(config.init_from)
    model.to(
        device, dtype
    )  # the weights themselves: making a token is little more than reading all of them
    start = read_start(config.start)
    prompt = torch.tensor([tok.encode(start)], device=device)  # (1, T)
    if config.compile is True:
        model.forward, reason = runtime.compile_model(
            model.forward, lambda forward: forward(prompt)
        )
        if reason:
            print(f"not compiled: {reason}", file=sys.stderr)
    generator = torch.Generator(device).manual_seed(config.seed)
    for n in range(config.num_samples):
        if n > 0:
            print("-" * 80)
        print(start, end="")
        # A character can have bytes in several tokens: the decoder waits until it is whole.
        decoder, said = codecs.getincrementaldecoder("utf-8")("replace"), ""
        for token in model.generate(
            prompt, config.max_new_tokens, config.temperature, config.top_k, config.top_p, generator
        ):
            new = decoder.decode(tok.decode_bytes([token.item()]))
            print(new, end="", flush=True)
            said = (said + new)[-len(config.stop + new) :]
            if config.stop and config.stop in said:
                break
        print(decoder.decode(b"", final=True))


if __name__ == "__main__":
    run(main, config)
