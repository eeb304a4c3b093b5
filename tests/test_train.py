"""Training runs of a tiny model: what they compute, write, repeat and refuse."""

import contextlib
import math
import os
import signal
import subprocess
import sys
from configurator import UserError, read_options
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TEXT, assert_same_run, logged, options, weights
from test_model import reference

import train
from support.checkpoint import load_checkpoint
from support.log import shorten

# What a run computes


def test_one_seed_gives_the_same_bits_and_another_seed_does_not(tiny_run):
    a, b, c = (
        tiny_run(out_dir=f"out/{i}", seed=seed, dropout=0.1) for i, seed in enumerate((1, 1, 2))
    )
    assert_same_run(a, b)
    assert not torch.equal(weights(a)["lm_head.weight"], weights(c)["lm_head.weight"])


@pytest.mark.slow  # compiles twice
def test_two_compiled_runs_on_two_threads_end_with_the_same_bits(tiny_run):
    """Large enough for the threads to share the sum over the embeddings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        size = {"batch_size": 32, "block_size": 64, "n_embd": 64, "compile": True}
        assert_same_run(*(tiny_run(out_dir=f"out/{i}", **size) for i in range(2)))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "changed",
    [
        {"dtype": "float32"},
        {"dtype": "bfloat16", "dropout": 0.2},
        {"optimizer": "muon", "dropout": 0.2},
        {"dtype": "float16", "optimizer": "muon"},
        pytest.param(
            {"compile": True, "dropout": 0.2, "dtype": "bfloat16"}, marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_a_resumed_run_ends_with_the_bits_of_the_uninterrupted_run(tiny_run, monkeypatch, changed):
    changed = {"sample_interval": 6, "sample_start": "1", **changed}
    whole = tiny_run(out_dir="out/whole", **changed)
    train_step = train.Trainer.train_step

    def stop_after_steps(trainer, step, *args):
        if step in (4, 5, 9):  # after step 5 an evaluation is due that was not made
            signal.raise_signal(signal.SIGTERM)
        return train_step(trainer, step, *args)

    monkeypatch.setattr(train.Trainer, "train_step", stop_after_steps)
    for init_from in ("scratch", "resume", "resume"):
        with pytest.raises(SystemExit) as exit_:
            tiny_run(out_dir="out/parts", init_from=init_from, **changed)
        assert exit_.value.code == 128 + signal.SIGTERM
    tiny_run(out_dir="out/parts", init_from="resume", **changed)
    assert_same_run(whole, Path("out/parts"))
    assert len(logged(whole)) == 12 + 3 + 3  # updates, evaluations and samples


def test_accumulated_gradients_are_those_of_the_whole_batch(tiny_run, tiny_trainer):
    """torch's own AdamW on the mean loss of all eight sequences of a step."""
    changed = {"max_iters": 3, "grad_clip": 0.5, "weight_decay": 0.3, "dtype": "float32"}
    changed |= {"beta1": 0.8, "beta2": 0.9}
    out_dir, trainer = tiny_run(**changed), tiny_trainer(**changed)
    model, parameters = trainer.model, list(trainer.model.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.3},
            {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
        ],
        betas=(0.8, 0.9),
    )
    records = [r for r in logged(out_dir) if "loss" in r]
    for step in range(3):
        batches = [trainer.micro_batch(step, micro) for micro in range(2)]
        x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
        assert x.shape == (8, 16)
        loss = model(x, y)[1]
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        found = (records[step]["loss"], records[step]["grad_norm"])
        assert found == pytest.approx((loss.item(), norm.item()), rel=1e-4)
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(step, trainer.config)
        optimizer.step()
        optimizer.zero_grad()
    for name, p in model.state_dict().items():
        found = weights(out_dir)[name]
        if name.endswith("c_attn.bias"):
            # Softmax ignores the bias of the keys: its gradient is rounding error, which AdamW
            # makes as large as every other update.
            found, p = (torch.cat((bias[:16], bias[32:])) for bias in (found, p))
        torch.testing.assert_close(found, p, rtol=1e-4, atol=1e-6)


def test_a_step_in_smaller_parts_has_the_same_losses(tiny_run):
    """As README.md advises when memory runs out."""
    large = logged(tiny_run(dtype="float32"))
    small = logged(tiny_run(dtype="float32", batch_size=2, gradient_accumulation_steps=4))
    for a, b in zip(large, small, strict=True):
        assert a == pytest.approx(b, rel=1e-3)


def test_another_seed_has_other_batches(tiny_trainer):
    first, second = (tiny_trainer(seed=seed).micro_batch(0, 0)[0] for seed in (1, 2))
    assert not torch.equal(first, second)


def test_validation_loss_is_that_of_transformers_over_every_token(tiny_run):
    out_dir = tiny_run(dtype="float32")
    model, checkpoint = load_checkpoint(out_dir / "ckpt.pt")
    theirs, chars = reference(model), checkpoint["tokenizer"]["chars"]
    ids = torch.tensor([chars.index(char) for char in TEXT[int(0.9 * len(TEXT)) :]])
    total = 0.0
    for start in range(0, len(ids) - 1, 16):
        window = ids[start : start + 17]
        logits = theirs(window[None, :-1]).logits[0]
        total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    evaluations = [r for r in logged(out_dir) if "val_loss" in r]
    assert [r["step"] for r in evaluations] == [0, 6, 12]
    assert evaluations[-1]["val_loss"] == pytest.approx(total / (len(ids) - 1), rel=1e-5)


def test_batches_given_to_a_step_take_the_place_of_its_own(tiny_trainer):
    own, given, other = (tiny_trainer() for _ in range(3))
    batches = [own.micro_batch(0, micro) for micro in range(2)]
    own.train_step(0, lr=0.01)
    given.train_step(0, lr=0.01, batches=batches)
    other.train_step(0, lr=0.01, batches=batches[:1])
    for a, b in zip(own.model.parameters(), given.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(own.model.lm_head.weight, other.model.lm_head.weight)


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_learning_rate_is_that_of_torchs_schedulers(shape):
    steps = {"warmup_iters": 10, "max_iters": 50, "lr_decay_iters": 40}
    config = train.TrainConfig(learning_rate=0.5, min_lr=0.1, lr_schedule=shape, **steps)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    lrs = torch.optim.lr_scheduler
    decay = {
        "cosine": lambda: lrs.CosineAnnealingLR(optimizer, T_max=30, eta_min=0.1),
        "linear": lambda: lrs.LinearLR(optimizer, 1.0, end_factor=0.2, total_iters=30),
    }
    warmup = lrs.LinearLR(optimizer, start_factor=1 / 11, total_iters=10)
    scheduler = lrs.SequentialLR(optimizer, [warmup, decay[shape]()], milestones=[10])
    for step in range(41):
        assert train.learning_rate(step, config) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert train.learning_rate(49, config) == pytest.approx(0.1)


def test_learning_rate_stays_at_its_peak_without_decay():
    assert train.learning_rate(49, train.TrainConfig(decay_lr=False, warmup_iters=1)) == 6e-4


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_learns(tiny_run, optimizer):
    records = logged(tiny_run(max_iters=150, eval_interval=150, eval_iters=5, optimizer=optimizer))
    losses = [r["val_loss"] for r in records if "val_loss" in r]
    assert losses[0] == pytest.approx(math.log(18), rel=0.02)
    assert losses[-1] < 1.7


def test_float32_and_bfloat16_runs_agree(tiny_run):
    full, half = (logged(tiny_run(dtype=dtype)) for dtype in ("float32", "bfloat16"))
    for a, b in zip(full, half, strict=True):
        assert a.get("val_loss", 0) == pytest.approx(b.get("val_loss", 0), rel=1e-2)
    assert full != half


# What a run writes


def test_a_run_leaves_its_log_samples_picture_and_checkpoints(tiny_run, capsys):
    out_dir = tiny_run(sample_interval=12, sample_start="3 times", sample_tokens=20)
    names = {"ckpt.pt", "best.pt", "log.jsonl", "samples.md", "loss.png"}
    assert {path.name for path in out_dir.iterdir()} == names
    records = logged(out_dir)
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 13))
    samples = [r["sample"] for r in records if "sample" in r]
    assert len(samples) == 2 and all(s.startswith("3 times") and len(s) == 27 for s in samples)
    page, printed = (out_dir / "samples.md").read_text(encoding="utf-8"), capsys.readouterr().out
    assert all(sample in page for sample in samples)
    assert all(f"| {shorten(sample)}\n" in printed for sample in samples)
    losses = [r["val_loss"] for r in records if "val_loss" in r]
    assert f"| validation loss {losses[-1]:.4f}\n" in printed
    assert "python sample.py --out_dir=out/tiny" in printed
    assert (out_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    best, last = (load_checkpoint(out_dir / name)[1].keys() for name in ("best.pt", "ckpt.pt"))
    assert best < last


def test_the_best_checkpoint_has_the_lowest_validation_loss(tiny_run, monkeypatch):
    losses = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(train.Trainer, "evaluate", lambda _: (9.0, next(losses)))
    out_dir = tiny_run()
    assert load_checkpoint(out_dir / "best.pt")[1]["step"] == 6
    last = load_checkpoint(out_dir / "ckpt.pt")[1]
    assert (last["step"], last["best_val_loss"]) == (12, 1.0)


def test_always_save_checkpoint_false_saves_only_improvements(tiny_run, monkeypatch):
    losses = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(train.Trainer, "evaluate", lambda _: (9.0, next(losses)))
    monkeypatch.setattr(train.Trainer, "save_is_due", lambda *_: True)
    assert load_checkpoint(tiny_run(always_save_checkpoint=False) / "ckpt.pt")[1]["step"] == 6


def test_target_val_loss_stops_the_run(tiny_run):
    records = logged(tiny_run(eval_interval=2, target_val_loss=2.8))
    losses = [r["val_loss"] for r in records if "val_loss" in r]
    assert len(losses) < 7 and losses[-1] <= 2.8 < losses[-2]


def test_a_run_that_reached_its_target_is_over_when_started_again(tiny_run):
    before = logged(tiny_run(eval_interval=2, target_val_loss=2.8))
    assert logged(tiny_run(eval_interval=2, target_val_loss=2.8, init_from="auto")) == before


def test_eval_only_prints_the_losses_and_writes_nothing(tiny_run, capsys):
    out_dir = tiny_run()
    before = {path: path.read_bytes() for path in out_dir.iterdir()}
    capsys.readouterr()
    tiny_run(init_from="resume", eval_only=True)
    printed, end = capsys.readouterr().out, logged(out_dir)[-1]
    train_loss, val_loss = end["train_loss"], end["val_loss"]
    losses = f"step 12: training loss {train_loss:.4f}, validation loss {val_loss:.4f}"
    assert losses in printed
    # In data/tiny a token is a character of one byte.
    bits = val_loss / math.log(2)
    assert f"perplexity {math.exp(val_loss):.2f}, {bits:.4f} bits per byte" in printed
    assert {path: path.read_bytes() for path in out_dir.iterdir()} == before


@pytest.mark.parametrize(
    ("interval", "steps"),
    [(200, [0, 25, 50, 100, 200, 250]), (80, [0, 25, 50, 80, 100, 160, 240, 250]), (0, [])],
)
def test_samples_come_early_at_their_interval_and_at_the_end(
    tiny_run, interval, steps, monkeypatch
):
    monkeypatch.setattr(train.Trainer, "train_step", lambda *_, **__: torch.zeros(3))
    changed = {"sample_interval": interval, "sample_start": "1", "sample_tokens": 2}
    run = {"max_iters": 250, "eval_interval": 245, "eval_iters": 1, "log_interval": 250}
    records = logged(tiny_run(**changed, **run))
    assert [r["step"] for r in records if "sample" in r] == steps


@pytest.mark.parametrize("stop", [0, 1, 3, 4, 6])
def test_a_resumed_run_has_the_log_of_one_that_was_not_interrupted(tiny_run, monkeypatch, stop):
    """The checkpoint is from after step `stop`, and the log goes on for two steps after that."""
    options = {"sample_interval": 3, "sample_start": "1", "sample_tokens": 4, "eval_interval": 3}
    whole = logged(tiny_run(**options, max_iters=6))
    original = train.Trainer.train_step

    def step_or_fail(trainer, step, *args, **kwargs):
        if step == stop:
            trainer.save_state(step)
        if step == stop + 2:
            raise KeyboardInterrupt
        return original(trainer, step, *args, **kwargs)

    with monkeypatch.context() as patched, contextlib.suppress(KeyboardInterrupt):
        patched.setattr(train.Trainer, "train_step", step_or_fail)
        tiny_run(**options, max_iters=6)
    records = logged(tiny_run(**options, max_iters=6, init_from="resume"))
    times = {"seconds": 0, "tokens_per_second": 0}
    assert [r | times for r in records] == [r | times for r in whole]


def test_a_new_run_keeps_an_earlier_one(tiny_run, capsys):
    contents = [(tiny_run(seed=n, max_iters=2) / "ckpt.pt").read_bytes() for n in range(3)]
    assert f"the earlier run is now in {Path('out/tiny.2').resolve()}" in capsys.readouterr().out
    paths = [Path(f"out/{name}/ckpt.pt") for name in ("tiny.1", "tiny.2", "tiny")]
    assert [path.read_bytes() for path in paths] == contents
    Path("out/tiny/ckpt.pt").unlink()  # the best weights alone are worth keeping, too
    best = Path("out/tiny/best.pt").read_bytes()
    tiny_run(max_iters=1)
    assert Path("out/tiny.3/best.pt").read_bytes() == best


def test_an_earlier_run_in_the_current_folder_is_not_overwritten(tiny_run):
    first = (tiny_run(out_dir=".", max_iters=1) / "ckpt.pt").read_bytes()
    for out_dir in (".", "", str(Path.cwd())):
        with pytest.raises(UserError, match="the folder that you are in, and it has an earlier"):
            tiny_run(out_dir=out_dir, max_iters=2)
    assert Path("ckpt.pt").read_bytes() == first


@pytest.mark.skipif(os.name == "nt", reason="Windows lets only administrators make links")
def test_a_run_folder_may_be_a_link(tiny_run, tmp_path):
    Path("drive").mkdir()
    Path("out").mkdir()
    Path("out/link").symlink_to(Path("drive").resolve(), target_is_directory=True)
    contents = [
        (tiny_run(seed=n, max_iters=1, out_dir="out/link") / "ckpt.pt").read_bytes() for n in (0, 1)
    ]
    assert [Path(f"{name}/ckpt.pt").read_bytes() for name in ("drive.1", "drive")] == contents


def test_saving_waits_for_its_interval_and_for_100_times_its_duration(tiny_trainer, monkeypatch):
    trainer = tiny_trainer()
    now = trainer.saved_at
    monkeypatch.setattr(train.time, "perf_counter", lambda: now)
    for save_seconds, age, due in (
        (0.1, 59, False),
        (0.1, 61, True),
        (1.0, 61, False),
        (1.0, 101, True),
        (600.0, 3599, False),
        (600.0, 3601, True),
    ):
        trainer.save_seconds, now = save_seconds, trainer.saved_at + age
        assert trainer.save_is_due(60) is due


def test_checkpoints_between_evaluations_limit_what_a_kill_can_cost(tiny_run, monkeypatch):
    saved = []
    monkeypatch.setattr(train.Trainer, "save_state", lambda trainer, step: saved.append(step))
    monkeypatch.setattr(train.Trainer, "save_is_due", lambda *_: True)
    tiny_run()
    assert saved == [0, 1, 2, 3, 4, 5, 6, 6, 7, 8, 9, 10, 11, 12, 12]
    saved.clear()
    tiny_run(checkpoint_interval=0, out_dir="out/other")
    assert saved == [0, 6, 12]


def test_an_evaluation_that_was_logged_but_not_saved_is_logged_once(tiny_run, monkeypatch):
    """A kill between the log line of an evaluation and the checkpoint of the same step."""
    whole = tiny_run(out_dir="out/whole")
    save_state = train.Trainer.save_state

    def save_or_stop(trainer, step):
        if trainer.evaluated_step == 6:
            raise SystemExit
        save_state(trainer, step)

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "save_state", save_or_stop)
        patch.setattr(train.Trainer, "save_is_due", lambda *_: True)
        with pytest.raises(SystemExit):
            tiny_run()
    assert logged(tiny_run(init_from="auto")) == logged(whole)


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no signals to another process")
@pytest.mark.parametrize(
    "name",
    [
        "SIGTERM",
        pytest.param("SIGINT", marks=pytest.mark.slow),
        pytest.param("SIGHUP", marks=pytest.mark.slow),
    ],
)
def test_a_signal_finishes_the_step_saves_and_prints_how_to_continue(tiny_run, name):
    args = options(tiny_run, max_iters=100_000, eval_interval=100_000)
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *args], stdout=subprocess.PIPE, text=True
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step     20"):
            process.send_signal(getattr(signal, name))
    assert process.wait() == 128 + getattr(signal, name)
    assert "--init_from=resume" in lines[-1]
    step = load_checkpoint(Path("out/tiny/ckpt.pt"))[1]["step"]
    assert step >= 20 and f"step {step:,}" in lines[-1]


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no signals to another process")
@pytest.mark.parametrize("stderr", [subprocess.PIPE, subprocess.STDOUT])
@pytest.mark.parametrize("interrupt", [False, True])
def test_a_closed_pipe_costs_no_work(tiny_run, interrupt, stderr):
    """As with `train.py | head`, or with `train.py | tee log` and Ctrl-C, which ends tee first."""
    args = options(tiny_run, max_iters=100_000, eval_interval=100_000)
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *args], stdout=subprocess.PIPE, stderr=stderr, text=True
    )
    while not process.stdout.readline().startswith("step     20"):
        assert process.poll() is None
    if interrupt:
        process.send_signal(signal.SIGSTOP)  # so that it finds the signal before its next line
    process.stdout.close()
    if interrupt:
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGCONT)
    assert process.stderr is None or "saved and stopped after step" in process.stderr.read()
    assert process.wait() == 128 + signal.SIGTERM
    assert load_checkpoint(Path("out/tiny/ckpt.pt"))[1]["step"] >= 20


# What a run refuses


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--batch_size=0", "batch_size=0 must be at least 1"),
        ("--dropout=1", "dropout=1.0 must be at least 0"),
        ("--weight_decay=-0.1", "weight_decay=-0.1 must be at least 0"),
        ("--learning_rate=0", "learning_rate=0.0 must be at least 1e-12"),
        ("--beta2=1", "beta2=1.0 must be at least 0"),
        ("--n_head=7", "n_embd=768 must be a multiple of n_head=7"),
        ("--min_lr=1", "min_lr=1.0 is above learning_rate=0.0006"),
        ("--init_from=", "init_from is empty"),
        ("--seed=99999999999999999999", "seed"),
    ],
)
def test_options_out_of_range_are_refused(argument, words):
    with pytest.raises(UserError, match=words):
        read_options(train.TrainConfig, [argument])


def test_samples_without_a_prompt_are_refused():
    with pytest.raises(UserError, match="sample_start is empty; give a prompt"):
        read_options(train.TrainConfig, ["--sample_interval=3", "--sample_start="])


def test_a_mistake_in_a_run_ends_in_one_line_with_exit_code_1(tmp_path):
    args = [sys.executable, ROOT / "train.py", "--dataset=nowhere"]
    done = subprocess.run(args, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: data") and "prepare" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_prompt_outside_the_vocabulary_is_refused_before_training(tiny_run):
    with pytest.raises(UserError, match="'R'"):
        tiny_run(sample_interval=6, sample_start="ROMEO")
    assert not Path("out").exists()


def test_a_vocabulary_padded_below_its_size_is_refused(tiny_run):
    with pytest.raises(UserError, match=r"pad_vocab_to=10 is below the 18 tokens of data/tiny"):
        tiny_run(pad_vocab_to=10)
