"""Write a trained model as a folder for Hugging Face's transformers, or as a small checkpoint.

    python -m tools.export --out_dir=out/phase3_gpt2 --to=exported
    python -m tools.export --out_dir=out/phase3_gpt2 --to=small --weights_only

AutoModelForCausalLM and AutoTokenizer load the first folder, and so do vLLM, llama.cpp's converter
and lm-evaluation-harness. The second has a checkpoint for sample.py without the optimizer's state,
which is more than half of a checkpoint.
"""

from configurator import UserError, configure, run
from dataclasses import dataclass
from pathlib import Path

from support.checkpoint import save_checkpoint
from support.hub import load_model, write_folder


@dataclass(frozen=True)
class ExportConfig:
    """Write a trained model as a folder for transformers, or its weights alone for sample.py."""

    out_dir: str = "out/phase1_char"  # folder of the run
    checkpoint: str = "ckpt.pt"  # ckpt.pt: the last state; best.pt: the lowest loss
    to: str = ""  # the folder to write: new or empty
    weights_only: bool = False  # write a checkpoint without the optimizer's state

    def __post_init__(self) -> None:
        if not self.to:
            raise UserError("to is empty; name the folder to write, as in --to=exported")


def main(config: ExportConfig) -> None:
    folder, path = Path(config.to), Path(config.out_dir) / config.checkpoint
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"to={folder}: exists and is not an empty folder; name a new folder")
    model, tokenizer, checkpoint = load_model("resume", config.out_dir, config.checkpoint)
    print(f"{path}: writing {model.num_params():,} parameters to {folder} ...")
    if config.weights_only:
        names = ("step", "best_val_loss", "tokenizer", "train_config", "dataset")
        save_checkpoint(folder / "ckpt.pt", model, **{name: checkpoint[name] for name in names})
    else:
        write_folder(folder, model, tokenizer)
    files = sorted(folder.iterdir())
    megabytes = sum(file.stat().st_size for file in files) / 1e6
    print(f"{folder}: {', '.join(file.name for file in files)}")
    print(f"{megabytes:,.1f} MB; {path} has {path.stat().st_size / 1e6:,.1f} MB")


if __name__ == "__main__":
    run(main, configure(ExportConfig))
