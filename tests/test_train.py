"""Training runs of a tiny model: what they compute, write, repeat, and how they end."""

import math
import os
import signal
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import ROOT, TEXT, assert_same_run, logged, options, weights
from test_model import reference

import train
from configurator import UserError
from model import GPT
from support import data
from support.checkpoint import build_model, load_checkpoint
from support.log import shorten

CPU = torch.device("cpu")
SAVE_ALWAYS = {"checkpoint_interval": 1e-9}  # seconds: after every update

# What a run computes


def test_one_seed_gives_the_same_bits_and_another_seed_does_not(tiny_run):
    a, b, c = (tiny_run(out_dir=f"out/{i}", seed=s, dropout=0.1) for i, s in enumerate((1, 1, 2)))
    assert_same_run(a, b)
    assert not torch.equal(weights(a)["lm_head.weight"], weights(c)["lm_head.weight"])


@pytest.mark.parametrize(
    "changed",
    [
        {"dtype": "float32"},
        {"dtype": "bfloat16", "dropout": 0.2},
        {"optimizer": "muon", "dropout": 0.2},
        {"dtype": "float16", "optimizer": "muon"},
        pytest.param({"compile": True, "dropout": 0.2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_resumed_run_ends_with_the_bits_of_the_uninterrupted_run(
    tiny_run, before_update, changed
):
    changed = {"sample_interval": 6, "sample_start": "1", **changed}
    whole = tiny_run(out_dir="out/whole", **changed)

    def stop_after_steps(step, *_):
        if step in (4, 5, 9):  # after step 5 an evaluation is due that was not made
            signal.raise_signal(signal.SIGTERM)

    before_update(stop_after_steps)
    for init_from in ("scratch", "resume", "resume"):
        with pytest.raises(SystemExit) as exit_:
            tiny_run(out_dir="out/parts", init_from=init_from, **changed)
        assert exit_.value.code == 128 + signal.SIGTERM
    tiny_run(out_dir="out/parts", init_from="resume", **changed)
    assert_same_run(whole, Path("out/parts"))
    assert len(logged(whole)) == 12 + 3 + 3  # updates, evaluations and samples


def test_a_run_computes_what_a_plain_loop_computes(tiny_run, dataset):
    """torch's own AdamW on the mean loss of all eight sequences of a step."""
    changed = {"max_iters": 3, "grad_clip": 0.5, "weight_decay": 0.3, "dtype": "float32"}
    config = train.TrainConfig(**tiny_run.options | changed | {"beta1": 0.8, "beta2": 0.9})
    out_dir = tiny_run(**changed, beta1=0.8, beta2=0.9)
    torch.manual_seed(config.seed)
    model = GPT(load_checkpoint(out_dir / "ckpt.pt").shape)
    parameters = list(model.parameters())
    matrices = {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.3}
    vectors = {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([matrices, vectors], betas=(0.8, 0.9))
    ids = torch.from_numpy(np.fromfile(dataset / "train.bin", "<u2").astype(np.int64))
    records = [r for r in logged(out_dir) if "loss" in r]
    for step in range(3):
        offsets = data.random_offsets(config.seed, step, 8, len(ids), 16)
        windows = torch.stack([ids[i : i + 17] for i in offsets])
        loss = model(windows[:, :-1], windows[:, 1:])[1]
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        found = [records[step][name] for name in ("loss", "grad_norm", "lr")]
        lr = train.learning_rate(step, config)
        assert found == pytest.approx([loss.item(), norm.item(), lr], rel=1e-4)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
    for name, p in model.state_dict().items():
        found = weights(out_dir)[name]
        if name.endswith("c_attn.bias"):
            # Softmax ignores the bias of the keys: its gradient is rounding error, which AdamW
            # makes as large as every other update.
            found, p = (torch.cat((bias[:16], bias[32:])) for bias in (found, p))
        torch.testing.assert_close(found, p, rtol=1e-4, atol=1e-6)


def test_batches_depend_on_seed_and_step_alone_and_processes_share_them(tiny_run, dataset):
    tokens = data.Tokens(dataset / "train.bin")

    def take(n: int, micros, step: int, **changed) -> torch.Tensor:
        four = {"gradient_accumulation_steps": 4}
        config = train.TrainConfig(**tiny_run.options | four | changed)
        batches = train.micro_batches(tokens, config, 16, CPU, micros, step)
        return torch.stack([torch.stack(next(batches)) for _ in range(n)])  # (n, 2, B, T)

    whole = take(12, range(4), 0)  # of three steps
    assert whole.shape == (12, 2, 4, 16) and torch.equal(whole[:, 0, :, 1:], whole[:, 1, :, :-1])
    assert torch.equal(take(8, range(4), 1), whole[4:])
    assert torch.equal(take(4, range(2), 0), whole[[0, 1, 4, 5]])  # of the first of two processes
    assert torch.equal(take(4, range(2, 4), 0), whole[[2, 3, 6, 7]])
    larger = take(2, range(1), 0, batch_size=16, gradient_accumulation_steps=1)
    assert torch.equal(larger[0, 0], whole[:4, 0].flatten(0, 1))
    assert not torch.equal(whole[:4], whole[4:8]) and not torch.equal(whole[0], whole[1])
    assert not torch.equal(take(1, range(4), 0, seed=2), whole[:1])


def test_dropout_depends_on_seed_step_and_forward_pass_alone():
    def draw(seed: int, step: int, micro: int) -> float:
        train.seed_dropout(train.TrainConfig(seed=seed, dropout=0.1), step, micro)
        return torch.rand(()).item()

    draws = [draw(1, 2, 3), draw(2, 2, 3), draw(1, 3, 3), draw(1, 2, 4), draw(1, 3, 2)]
    assert len(set(draws)) == 5 and draw(1, 2, 3) == draws[0]


def test_losses_are_those_of_transformers_over_every_token(tiny_run, dataset):
    out_dir = tiny_run(dtype="float32", dropout=0.5)
    checkpoint = load_checkpoint(out_dir / "ckpt.pt")
    theirs = reference(build_model(checkpoint.shape, checkpoint.weights))
    ids = torch.from_numpy(np.fromfile(dataset / "val.bin", "<u2").astype(np.int64))
    total = 0.0
    for start in range(0, len(ids) - 1, 16):
        window = ids[start : start + 17]
        logits = theirs(window[None, :-1]).logits[0]
        total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    evaluations = [r for r in logged(out_dir) if "val_loss" in r]
    assert [r["step"] for r in evaluations] == [0, 6, 12]
    assert evaluations[-1]["val_loss"] == pytest.approx(total / (len(ids) - 1), rel=1e-5)


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_learning_rate_is_that_of_torchs_schedulers(shape):
    steps = {"warmup_iters": 10, "max_iters": 50, "lr_decay_iters": 40}
    config = train.TrainConfig(learning_rate=0.5, min_lr=0.1, lr_schedule=shape, **steps)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    lrs = torch.optim.lr_scheduler
    warmup = lrs.LinearLR(optimizer, start_factor=1 / 11, total_iters=10)
    decay = lrs.LinearLR(optimizer, 1.0, end_factor=0.2, total_iters=30)
    if shape == "cosine":
        decay = lrs.CosineAnnealingLR(optimizer, T_max=30, eta_min=0.1)
    scheduler = lrs.SequentialLR(optimizer, [warmup, decay], milestones=[10])
    for step in range(41):
        assert train.learning_rate(step, config) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert train.learning_rate(49, config) == pytest.approx(0.1)


def test_learning_rate_stays_at_its_peak_without_decay_and_decays_to_the_end_by_default():
    assert {train.learning_rate(s, train.TrainConfig(decay_lr=False)) for s in (0, 49)} == {6e-4}
    config = train.TrainConfig(max_iters=100, warmup_iters=0, learning_rate=0.4, min_lr=0.2)
    rates = [train.learning_rate(step, config) for step in (0, 50, 100)]
    assert rates == pytest.approx([0.4, 0.3, 0.2])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_learns(tiny_run, optimizer):
    records = logged(tiny_run(max_iters=150, eval_interval=150, eval_iters=5, optimizer=optimizer))
    losses = [r["val_loss"] for r in records if "val_loss" in r]
    assert losses[0] == pytest.approx(math.log(18), rel=0.02)
    assert losses[-1] < 1.7


def test_float32_bfloat16_and_float16_runs_agree(tiny_run):
    full, *others = (logged(tiny_run(dtype=kind)) for kind in ("float32", "bfloat16", "float16"))
    for other in others:
        for a, b in zip(full, other, strict=True):
            assert a.get("val_loss", 0) == pytest.approx(b.get("val_loss", 0), rel=1e-2)
        assert full != other


# What a run writes


def test_a_run_leaves_its_log_samples_picture_and_checkpoints(tiny_run, capsys):
    out_dir = tiny_run(sample_interval=12, sample_start="3 times", sample_tokens=20)
    names = {"ckpt.pt", "best.pt", "log.jsonl", "samples.md", "loss.png"}
    assert {path.name for path in out_dir.iterdir()} == names
    records = logged(out_dir)
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 13))
    # a step has 2 x 4 x 16 tokens
    assert records[-1]["epoch"] == pytest.approx(12 * 128 / int(0.9 * len(TEXT)))
    samples = [r["sample"] for r in records if "sample" in r]
    assert len(samples) == 2 and all(s.startswith("3 times") and len(s) == 27 for s in samples)
    page, printed = (out_dir / "samples.md").read_text(encoding="utf-8"), capsys.readouterr().out
    assert all(sample in page for sample in samples)
    assert all(f"| {shorten(sample)}\n" in printed for sample in samples)
    losses = [r["val_loss"] for r in records if "val_loss" in r]
    assert f"| validation loss {losses[-1]:.4f}\n" in printed
    assert "python sample.py --out_dir=out/tiny" in printed
    assert "parameters: 2 layers, 2 heads, 16 wide, context 16, vocabulary 18" in printed
    assert "128 tokens per step" in printed and "cpu x 1, " in printed
    assert (out_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    last, best = (load_checkpoint(out_dir / name) for name in ("ckpt.pt", "best.pt"))
    assert last.optimizers and best.optimizers is None and best.scaler is None
    assert last.train_config["seed"] == 1337 and last.tokenizer["kind"] == "char"
    assert set(last.dataset) == {"train.bin", "val.bin"}


def losses_of(monkeypatch, *val_losses: float) -> None:
    """Have the next evaluations return these validation losses."""
    losses = iter(val_losses)
    monkeypatch.setattr(train, "evaluate", lambda *_: [9.0, next(losses)])


@pytest.mark.parametrize("always", [True, False])
def test_the_best_checkpoint_has_the_lowest_validation_loss(tiny_run, monkeypatch, always):
    losses_of(monkeypatch, 3.0, 1.0, 2.0)
    out_dir = tiny_run(always_save_checkpoint=always, **SAVE_ALWAYS)
    best, last = (load_checkpoint(out_dir / name) for name in ("best.pt", "ckpt.pt"))
    assert (best.step, best.best_val_loss) == (6, 1.0)
    assert (last.step, last.best_val_loss) == (12 if always else 6, 1.0)


def test_target_val_loss_ends_the_run_and_it_is_over_when_started_again(tiny_run):
    options = {"eval_interval": 2, "target_val_loss": 2.8}
    out_dir = tiny_run(**options)
    losses = [r["val_loss"] for r in logged(out_dir) if "val_loss" in r]
    assert len(losses) < 7 and losses[-1] <= 2.8 < losses[-2]
    before = (out_dir / "log.jsonl").read_bytes()
    tiny_run(**options, init_from="auto")
    assert (out_dir / "log.jsonl").read_bytes() == before  # not even evaluated again


def test_eval_only_prints_the_losses_and_writes_nothing(tiny_run, capsys):
    out_dir = tiny_run()
    before = {path: path.read_bytes() for path in out_dir.iterdir()}
    capsys.readouterr()
    tiny_run(init_from="resume", eval_only=True)
    printed, end = capsys.readouterr().out, logged(out_dir)[-1]
    train_loss, val_loss = end["train_loss"], end["val_loss"]
    losses = f"training loss {train_loss:.4f}, validation loss {val_loss:.4f}"
    assert f"step 12: {losses}" in printed
    assert {path: path.read_bytes() for path in out_dir.iterdir()} == before


@pytest.mark.parametrize(
    ("interval", "steps"), [(80, [0, 25, 50, 80, 100, 160, 165]), (400, [0, 25, 50, 100, 165])]
)
def test_samples_come_early_at_their_interval_and_at_the_end(tiny_run, interval, steps):
    changed = {"sample_interval": interval, "sample_start": "1", "sample_tokens": 2}
    size = {"n_layer": 1, "batch_size": 1, "gradient_accumulation_steps": 1}
    run = {"max_iters": 165, "eval_interval": 161, "eval_iters": 1, "log_interval": 165}
    records = logged(tiny_run(**changed, **size, **run))
    assert [r["step"] for r in records if "sample" in r] == steps


@pytest.mark.parametrize("stop", [0, 1, 3])
def test_a_resumed_run_has_the_log_of_one_that_was_not_interrupted(tiny_run, before_update, stop):
    """The checkpoint is from after step `stop`, and the log goes on for two steps after that."""
    options = {"sample_interval": 3, "sample_start": "1", "sample_tokens": 4, "eval_interval": 3}
    whole = tiny_run(**options, max_iters=6, out_dir="out/whole")
    killed, content = Path("out/tiny/ckpt.pt"), []

    def kill_once(*_):
        content.append(killed.read_bytes())  # of the checkpoints after 0, 1, 2 ... updates
        if len(content) == stop + 3:
            raise KeyboardInterrupt

    before_update(kill_once)
    with pytest.raises(KeyboardInterrupt):
        tiny_run(**options, max_iters=6, **SAVE_ALWAYS)
    killed.write_bytes(content[stop])
    assert_same_run(tiny_run(**options, max_iters=6, init_from="resume"), whole)


def test_epochs_count_the_tokens_read_and_losses_do_not_depend_on_the_batch_size(tiny_run):
    """Half the batch and twice the accumulation shows the same."""
    shown = []
    for batch_size, accumulation in ((8, 1), (4, 2)):
        batch = dict(batch_size=batch_size, gradient_accumulation_steps=accumulation, eval_iters=1)
        records = logged(tiny_run(out_dir=f"out/{batch_size}", dtype="float32", **batch))
        shown.append([r.get("val_loss", r.get("loss")) for r in records])
    assert shown[0] == pytest.approx(shown[1], rel=1e-5)
    before = logged(Path("out/8"))[-1]
    more = dict(init_from="resume", eval_iters=1, batch_size=2, max_iters=24)
    records = logged(tiny_run(out_dir="out/8", **more))
    n_tokens, epochs = 6454, [r["epoch"] for r in records]
    assert epochs == sorted(epochs) and before["epoch"] == 12 * 8 * 16 / n_tokens
    assert epochs[-1] == (12 * 8 * 16 + 12 * 4 * 16) / n_tokens
    assert load_checkpoint(Path("out/8/ckpt.pt")).tokens == 12 * 8 * 16 + 12 * 4 * 16


def test_a_run_can_begin_with_the_weights_of_another(tiny_run):
    loss = logged(tiny_run(out_dir="out/first", dtype="float32"))[-1]["val_loss"]
    records = logged(tiny_run(dtype="float32", init_from="out/first", n_layer=5))
    assert records[0]["val_loss"] == pytest.approx(loss, rel=1e-6) and records[0]["step"] == 0


def test_checkpoints_between_evaluations_limit_what_a_kill_can_cost(tiny_run, monkeypatch):
    saved, now = [], [0.0]
    monkeypatch.setattr(train, "save_checkpoint", lambda p, c: saved.append((p.name, c.step)))
    monkeypatch.setattr(train.time, "perf_counter", lambda: now[0])
    advance = lambda *_: now.__setitem__(0, now[0] + 10)  # noqa: E731
    monkeypatch.setattr(train, "seed_dropout", advance)  # twice in a step
    losses_of(monkeypatch, 3.0, 4.0, 5.0)
    tiny_run(checkpoint_interval=50)
    first = [("best.pt", 0), ("ckpt.pt", 0)]
    assert saved == [*first, *(("ckpt.pt", step) for step in (3, 6, 9, 12))]
    saved.clear()
    losses_of(monkeypatch, 3.0, 4.0, 5.0)
    tiny_run(checkpoint_interval=0, out_dir="out/other")
    assert saved == [*first, ("ckpt.pt", 6), ("ckpt.pt", 12)]


# How a run ends


def start_run(tiny_run, stderr=None) -> subprocess.Popen:
    """Start a long run, and return it when it has logged step 20."""
    args = options(tiny_run, max_iters=100_000, eval_interval=100_000)
    pipes = {"stdout": subprocess.PIPE, "stderr": stderr, "text": True}
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *args], **pipes)
    while not process.stdout.readline().startswith("step     20"):
        assert process.poll() is None
    return process


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no signals to another process")
@pytest.mark.parametrize(
    "name", ["SIGTERM", *(pytest.param(n, marks=pytest.mark.slow) for n in ("SIGINT", "SIGHUP"))]
)
def test_a_signal_finishes_the_step_saves_and_prints_how_to_continue(tiny_run, name):
    process = start_run(tiny_run)
    process.send_signal(getattr(signal, name))
    lines = process.stdout.readlines()
    assert process.wait() == 128 + getattr(signal, name)
    assert "--init_from=resume" in lines[-1]
    step = load_checkpoint(Path("out/tiny/ckpt.pt")).step
    assert step >= 20 and f"step {step:,}" in lines[-1]


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no signals to another process")
@pytest.mark.parametrize("stderr", [subprocess.PIPE, subprocess.STDOUT])
@pytest.mark.parametrize("interrupt", [False, True])
def test_a_closed_pipe_costs_no_work(tiny_run, interrupt, stderr):
    """As with `train.py | head`, or with `train.py | tee log` and Ctrl-C, which ends tee first."""
    process = start_run(tiny_run, stderr)
    if interrupt:
        process.send_signal(signal.SIGSTOP)  # so that it finds the signal before its next line
    process.stdout.close()
    if interrupt:
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGCONT)
    if process.stderr:
        process.stderr.read()
    assert process.wait() == 128 + (signal.SIGINT if interrupt else signal.SIGTERM)
    assert load_checkpoint(Path("out/tiny/ckpt.pt")).step >= 20


def test_a_validation_loss_that_is_not_finite_ends_the_run_unsaved(tiny_run, monkeypatch):
    losses_of(monkeypatch, 3.0, math.nan)
    with pytest.raises(UserError, match="step 6: the validation loss is nan; not saved"):
        tiny_run()
    assert load_checkpoint(Path("out/tiny/ckpt.pt")).step == 0


def not_finite(gradient_or_loss: torch.Tensor, value: float = math.nan) -> torch.Tensor:
    return gradient_or_loss * value


def snapshot(model: GPT, optimizers) -> list[torch.Tensor]:
    """Return copies of the weights and of the optimizers' states."""
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    values = [*model.parameters(), *(value for state in states for value in state.values())]
    return [value.detach().clone() for value in values]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("part", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_ends_the_run_and_nothing_has_changed(
    tiny_run, before_update, optimizer, dtype, part
):
    """Scaled loss and gradients of float16 may overflow, but then the scale is 1 in the end."""
    seen = []

    def poison(step, model, optimizers):
        seen.append(snapshot(model, optimizers))
        if step == 8:
            forward = lambda _module, _inputs, output: (None, not_finite(output[1]))  # noqa: E731
            if part == "loss":
                model.register_forward_hook(forward)
            model.transformer.wpe.weight.register_hook(not_finite)

    before_update(poison)
    with pytest.raises(UserError) as error:
        tiny_run(dtype=dtype, optimizer=optimizer, max_iters=60)
    loss, last = "nan" if part == "loss" else r"2\.\d+", len(seen) - 1
    assert error.match(rf"step {last}: the loss is {loss} and the gradient norm nan, at learning r")
    assert "step was not taken" in str(error.value)
    # float16's scaler, at 65,536 in the beginning, first answers gradients with a smaller scale
    assert last == (24 if (dtype, part) == ("float16", "gradient") else 8)
    assert all(map(torch.equal, seen[8], seen[-1])) and len(seen[8]) > 26
    assert all(value.isfinite().all() for value in seen[-1])
    assert load_checkpoint(Path("out/tiny/ckpt.pt")).step == last // 6 * 6


def test_a_nan_is_named_if_memory_is_too_small_to_explain_it(tiny_run, before_update, monkeypatch):
    monkeypatch.setattr(train, "explain", Mock(side_effect=torch.OutOfMemoryError))
    before_update(lambda step, model, _: model.lm_head.weight.register_hook(not_finite))
    with pytest.raises(UserError, match=r"the gradient norm nan, .*; no cause was found"):
        tiny_run()


@pytest.mark.parametrize("name", ["wpe", "h.0.mlp.c_fc"])
def test_an_overflow_in_float16_skips_the_step_of_every_optimizer_and_lowers_the_scale(
    tiny_run, before_update, monkeypatch, name
):
    """AdamW has the positions and Muon the matrix of the MLP."""
    states, hooks = [], []

    def overflow_in_step_3(step, model, optimizers):
        states.append(snapshot(model, optimizers))
        if step == 3:
            weight = model.transformer.get_submodule(name).weight
            hooks.append(weight.register_hook(partial(not_finite, value=math.inf)))
        if step == 4:
            hooks[0].remove()

    monkeypatch.setattr(torch.amp.GradScaler, "_maybe_opt_step", None)  # it would wait for a GPU
    before_update(overflow_in_step_3)
    out_dir = tiny_run(dtype="float16", optimizer="muon")
    norms = [r["grad_norm"] for r in logged(out_dir) if "loss" in r]
    assert [step for step, norm in enumerate(norms) if norm is None] == [3]
    moved = [not any(map(torch.equal, a, b)) for a, b in pairwise(states[1:])]
    assert moved == [True, True, False, *[True] * 7] and all(map(torch.equal, *states[3:5]))
    assert all(value.isfinite().all() for value in states[-1])
    assert load_checkpoint(out_dir / "ckpt.pt").scaler["scale"] == 65536 / 2
