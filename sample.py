"""Write text with a trained model.

python sample.py --out_dir=out/phase1_char --start="ROMEO:" --temperature=0.8
python sample.py --init_from=gpt2-xl --start="The answer to life is"
"""

import codecs
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from configurator import UserError, check_range, configure, run
from support import runtime
from support.files import read_text
from support.hub import load_model


@dataclass(frozen=True)
class SampleConfig:
    """Print text that a trained model writes, token by token."""

    init_from: str = "resume"  # a run's model; or gpt2, gpt2-xl, owner/name, a folder
    out_dir: str = "out/phase1_char"  # folder of the run
    checkpoint: str = "ckpt.pt"  # ckpt.pt: the last state; best.pt: the lowest loss
    start: str = "\n"  # prompt; FILE:path reads it from a file
    num_samples: int = 1  # number of texts
    max_new_tokens: int = 500  # tokens per text
    temperature: float = 0.8  # divides the logits; 0: always the most likely token
    top_k: int | None = None  # draw from the k most likely tokens only
    top_p: float | None = None  # draw from the most likely tokens that reach this share
    stop: str = "<|endoftext|>"  # end a text where this was written; empty: never
    seed: int = 1337  # the same seed writes the same texts
    device: str = "auto"  # cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the weights

    def __post_init__(self) -> None:
        check_range(self, 1, 1 << 31, "num_samples", "max_new_tokens", "top_k")
        check_range(self, 0, 1e6, "temperature")
        check_range(self, 1e-12, 1, "top_p")
        check_range(self, 0, (1 << 63) - 1, "seed")
        if self.temperature == 0 and self.num_samples > 1:
            more = f"num_samples={self.num_samples} needs more"
            raise UserError(f"temperature=0 writes one text; {more}")


@runtime.explain_out_of_memory()
def main(config: SampleConfig) -> None:
    """Load the model, encode the prompt, and print each text while it is written."""
    device = runtime.resolve_device(config.device)
    dtype = runtime.resolve_dtype(config.dtype, device)
    saved = str(Path(config.out_dir, config.checkpoint))
    # without the rest of the checkpoint, which would stay in memory
    model, tokenizer = load_model(saved if config.init_from == "resume" else config.init_from)[:2]
    model.to(device, dtype)  # each token reads all weights: half the bytes is twice the speed
    start = config.start
    if start.startswith("FILE:"):
        start = read_text(Path(start.removeprefix("FILE:")).expanduser())
    if not start:
        raise UserError("start is empty; a model needs a prompt to continue, as in --start=A")
    prompt = torch.tensor([tokenizer.encode(start)], device=device)  # (1, T)
    runtime.pack_weights(model)
    options = {name: getattr(config, name) for name in ("temperature", "top_k", "top_p")}
    generator = torch.Generator(device).manual_seed(config.seed)
    for n in range(config.num_samples):
        print("-" * 80 + "\n" + start if n else start, end="")
        # One character may take several tokens: the decoder waits until it is complete.
        decoder, end = codecs.getincrementaldecoder("utf-8")("replace"), ""
        for token in model.generate(prompt, config.max_new_tokens, generator=generator, **options):
            new = decoder.decode(tokenizer.decode_bytes([token.item()]))
            print(new, end="", flush=True)
            end = (end + new)[-len(config.stop + new) :]
            if config.stop and config.stop in end:
                break
        print(decoder.decode(b"", final=True))


if __name__ == "__main__":
    run(main, configure(SampleConfig))
