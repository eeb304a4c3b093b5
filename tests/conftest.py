"""What the tests share: the top-level files on the path, and one small data set and run."""

import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

for name in ("SIGINT", "SIGHUP"):  # in the background these are ignored, also by the programs that tests start
    if hasattr(signal, name):
        signal.signal(getattr(signal, name), signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)

TEXT = "".join(f"{i} times {j} is {i * j}.\n" for i in range(40) for j in range(10))  # 18 characters


@pytest.fixture
def dataset(tmp_path, monkeypatch) -> Path:
    """The folder data/tiny, made from TEXT; the working directory is the one that holds data/."""
    import prepare_shakespeare

    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.txt").write_text(TEXT, encoding="utf-8")
    prepare_shakespeare.main(prepare_shakespeare.PrepareConfig(input="tiny.txt", dataset="tiny"))
    return tmp_path / "data" / "tiny"


@pytest.fixture
def tiny_run(dataset):
    """A function: train a tiny model with these options changed; returns its folder."""
    import train

    options = dict(
        dataset="tiny",
        out_dir="out/tiny",
        n_layer=2,
        n_head=2,
        n_embd=16,
        block_size=16,
        batch_size=4,
        gradient_accumulation_steps=2,
        max_iters=12,
        eval_interval=6,
        log_interval=1,
        warmup_iters=2,
        learning_rate=1e-2,
        min_lr=1e-3,
        compile=False,
    )

    def run(**changed) -> Path:
        config = train.TrainConfig(**{**options, **changed})
        train.main(config)
        return Path(config.out_dir)

    run.options = options
    return run
