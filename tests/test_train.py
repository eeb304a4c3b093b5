"""Runs of a tiny model: what they compute, write, repeat and refuse."""

import json
import math
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TEXT
from test_model import reference

import train
from configurator import UserError, read_options
from support import log as report
from support import runtime
from support.checkpoint import load_checkpoint
from support.optimizers import Muon

CPU = torch.device("cpu")


def logged(out_dir: Path) -> list[dict]:
    """The records of a run, without what depends on the clock."""
    clock = {"seconds", "tokens_per_second"}
    return [
        {k: v for k, v in r.items() if k not in clock}
        for r in report.read_log(out_dir / "log.jsonl")
    ]


def assert_same_run(a: Path, b: Path) -> None:
    """Weights, optimizer states and logs are equal to the last bit."""
    first, second = (load_checkpoint(path / "ckpt.pt")[1] for path in (a, b))
    for name in ("model", "optimizers", "scaler", "step", "best_val_loss", "evaluated_step"):
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)
    assert logged(a) == logged(b)


def options(tiny_run, **changed) -> list[str]:
    return [f"--{name}={value}" for name, value in {**tiny_run.options, **changed}.items()]


# What a run computes


def test_two_runs_with_one_seed_end_with_the_same_bits_and_another_seed_does_not(tiny_run):
    a, b, c = (
        tiny_run(out_dir=f"out/{i}", seed=seed, dropout=0.1) for i, seed in enumerate((1, 1, 2))
    )
    assert_same_run(a, b)
    weights = [load_checkpoint(path / "ckpt.pt")[1]["model"]["lm_head.weight"] for path in (a, c)]
    assert not torch.equal(*weights)


def test_two_compiled_runs_on_two_threads_end_with_the_same_bits(tiny_run):
    """Large enough that the threads share the sum over the embeddings."""
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
        {"compile": True, "dropout": 0.2, "dtype": "bfloat16"},
    ],
    ids=str,
)
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(tiny_run, monkeypatch, changed):
    whole = tiny_run(out_dir="out/whole", sample_interval=6, sample_start="1", **changed)
    taken = train.Trainer.train_step

    def stop_after_steps(trainer, step, *args):
        if step in (4, 5, 9):  # 6 steps done: an evaluation is due, and was not yet made
            os.kill(os.getpid(), signal.SIGTERM)
        return taken(trainer, step, *args)

    monkeypatch.setattr(train.Trainer, "train_step", stop_after_steps)
    for init_from in ("scratch", "resume", "resume"):
        with pytest.raises(SystemExit) as exit_:
            tiny_run(
                out_dir="out/parts",
                init_from=init_from,
                sample_interval=6,
                sample_start="1",
                **changed,
            )
        assert exit_.value.code == 143
    tiny_run(
        out_dir="out/parts", init_from="resume", sample_interval=6, sample_start="1", **changed
    )
    assert_same_run(whole, Path("out/parts"))
    assert len(logged(whole)) == 12 + 3


def test_accumulated_gradients_are_those_of_the_whole_batch(tiny_run):
    """torch's own AdamW on the mean loss of all eight sequences of a step."""
    out_dir = tiny_run(max_iters=3, grad_clip=0.5, weight_decay=0.3, dtype="float32")
    config = read_options(
        train.TrainConfig, options(tiny_run, max_iters=3, grad_clip=0.5, weight_decay=0.3)
    )
    trainer = train.Trainer(config, train.Processes(config))
    ours = trainer.model
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in ours.parameters() if p.dim() > 1], "weight_decay": 0.3},
            {"params": [p for p in ours.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    for step in range(3):
        batches = [trainer.micro_batch(step, micro) for micro in range(2)]
        x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
        assert x.shape == (8, 16)
        loss = ours(x, y)[1]
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(ours.parameters(), 0.5)
        record = [r for r in logged(out_dir) if "loss" in r][step]
        assert (record["loss"], record["grad_norm"]) == pytest.approx(
            (loss.item(), norm.item()), rel=1e-4
        )
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(step, config)
        optimizer.step()
        optimizer.zero_grad()
    saved = load_checkpoint(out_dir / "ckpt.pt")[1]["model"]
    for name, p in ours.state_dict().items():
        torch.testing.assert_close(saved[name], p, rtol=1e-4, atol=1e-6)


def test_validation_loss_is_that_of_transformers_over_every_token(tiny_run):
    out_dir = tiny_run(dtype="float32")
    ours, checkpoint = load_checkpoint(out_dir / "ckpt.pt")
    theirs = reference(ours)
    chars = checkpoint["tokenizer"]["chars"]
    ids = torch.tensor([chars.index(char) for char in TEXT[int(0.9 * len(TEXT)) :]])
    total = 0.0
    for start in range(0, len(ids) - 1, 16):
        window = ids[start : start + 17]
        logits = theirs(window[None, :-1]).logits[0]
        total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    evaluations = [r for r in logged(out_dir) if "val_loss" in r]
    assert [r["step"] for r in evaluations] == [0, 6, 12]
    assert evaluations[-1]["val_loss"] == pytest.approx(total / (len(ids) - 1), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_muon_steps_as_torch_does(dtype):
    """The same weights after ten steps; in float32 as near as torch's own products in bfloat16 are to it."""
    torch.manual_seed(0)
    shapes = [(48, 16), (16, 16), (48, 16), (16, 64), (64, 16), (16, 16)]
    start = [torch.randn(shape) for shape in shapes]
    ours, theirs = ([torch.nn.Parameter(w.clone()) for w in start] for _ in range(2))
    optimizers = (
        Muon(ours, lr=0.1, weight_decay=0.2, dtype=dtype),
        torch.optim.Muon(theirs, lr=0.1, weight_decay=0.2),
    )
    for _ in range(10):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, w in zip(ours, theirs, start, strict=True):
        assert (b - w).abs().max() > 0.3
        tolerance = 1e-6 if dtype == torch.bfloat16 else 0.03
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest_at_proportional_rates(
    tiny_run, monkeypatch
):
    config = read_options(
        train.TrainConfig, options(tiny_run, optimizer="muon", muon_lr=0.5, learning_rate=0.1)
    )
    trainer = train.Trainer(config, train.Processes(config))
    muon, adamw = trainer.optimizers
    assert type(muon) is Muon and type(adamw) is torch.optim.AdamW
    in_muon = {p for group in muon.param_groups for p in group["params"]}
    assert in_muon == {p for p in trainer.model.transformer.h.parameters() if p.dim() == 2}
    assert [group["weight_decay"] for group in muon.param_groups + adamw.param_groups] == [
        0.1,
        0.1,
        0.0,
    ]
    trainer.train_step(0, lr=0.02)
    assert [group["lr"] for group in muon.param_groups + adamw.param_groups] == pytest.approx(
        [0.1, 0.02, 0.02]
    )


def test_learning_rate_is_that_of_torch_schedulers():
    for shape in ("cosine", "linear"):
        config = train.TrainConfig(
            learning_rate=0.5,
            min_lr=0.1,
            warmup_iters=10,
            max_iters=50,
            lr_decay_iters=40,
            lr_schedule=shape,
        )
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
        lrs = torch.optim.lr_scheduler
        warmup = lrs.LinearLR(optimizer, start_factor=1 / 11, total_iters=10)
        if shape == "cosine":
            decay = lrs.CosineAnnealingLR(optimizer, T_max=30, eta_min=0.1)
        else:
            decay = lrs.LinearLR(optimizer, 1.0, end_factor=0.2, total_iters=30)
        scheduler = lrs.SequentialLR(optimizer, [warmup, decay], milestones=[10])
        for step in range(41):
            assert train.learning_rate(step, config) == pytest.approx(
                optimizer.param_groups[0]["lr"]
            ), (shape, step)
            optimizer.step()
            scheduler.step()
        assert train.learning_rate(49, config) == pytest.approx(0.1)
    assert train.learning_rate(49, train.TrainConfig(decay_lr=False, warmup_iters=1)) == 6e-4


def test_a_run_learns(tiny_run):
    evaluations = [
        r
        for r in logged(tiny_run(max_iters=150, eval_interval=150, eval_iters=5))
        if "val_loss" in r
    ]
    assert evaluations[0]["val_loss"] == pytest.approx(math.log(18), rel=0.02)
    assert evaluations[-1]["val_loss"] < 1.7


# What a run writes


def test_a_run_leaves_its_log_samples_picture_and_checkpoints(tiny_run, capsys):
    out_dir = tiny_run(sample_interval=12, sample_start="3 times", sample_tokens=20)
    assert {p.name for p in out_dir.iterdir()} == {
        "ckpt.pt",
        "best.pt",
        "log.jsonl",
        "samples.md",
        "loss.png",
    }
    records = logged(out_dir)
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 13))
    samples = [r["sample"] for r in records if "sample" in r]
    assert len(samples) == 2 and all(s.startswith("3 times") and len(s) == 27 for s in samples)
    markdown, printed = (
        (out_dir / "samples.md").read_text(encoding="utf-8"),
        capsys.readouterr().out,
    )
    assert all(sample in markdown for sample in samples)
    assert "epoch | training loss | validation loss | the model says" in printed
    assert f"{records[-1]['val_loss']:.4f}" in printed
    assert (out_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (
        load_checkpoint(out_dir / "best.pt")[1].keys()
        < load_checkpoint(out_dir / "ckpt.pt")[1].keys()
    )


def test_best_checkpoint_has_the_weights_of_the_lowest_validation_loss(tiny_run, monkeypatch):
    losses = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(train.Trainer, "losses", lambda _: (9.0, next(losses)))
    out_dir = tiny_run()
    assert load_checkpoint(out_dir / "best.pt")[1]["step"] == 6
    last = load_checkpoint(out_dir / "ckpt.pt")[1]
    assert (last["step"], last["best_val_loss"]) == (12, 1.0)


def test_always_save_checkpoint_false_keeps_the_best_alone(tiny_run, monkeypatch):
    losses = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(train.Trainer, "losses", lambda _: (9.0, next(losses)))
    assert load_checkpoint(tiny_run(always_save_checkpoint=False) / "ckpt.pt")[1]["step"] == 6


def test_target_val_loss_stops_the_run(tiny_run):
    evaluations = [
        r for r in logged(tiny_run(eval_interval=2, target_val_loss=2.8)) if "val_loss" in r
    ]
    assert len(evaluations) < 7
    assert evaluations[-1]["val_loss"] <= 2.8 < evaluations[-2]["val_loss"]


def test_eval_only_prints_the_losses_and_writes_nothing(tiny_run, capsys):
    out_dir = tiny_run()
    before = {p: p.read_bytes() for p in out_dir.iterdir()}
    capsys.readouterr()
    tiny_run(init_from="resume", eval_only=True)
    said, end = capsys.readouterr().out, logged(out_dir)[-1]
    assert (
        f"step 12: training loss {end['train_loss']:.4f}, validation loss {end['val_loss']:.4f}"
        in said
    )
    # In data/tiny a token is a character of one byte.
    assert (
        f"perplexity {math.exp(end['val_loss']):.2f}, {end['val_loss'] / math.log(2):.4f} bits per byte"
        in said
    )
    assert {p: p.read_bytes() for p in out_dir.iterdir()} == before


def test_max_iters_of_a_resumed_run_may_grow(tiny_run):
    tiny_run()
    records = logged(tiny_run(init_from="resume", max_iters=20))
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 21))


def test_a_log_line_cut_short_by_a_kill_is_left_out(tiny_run):
    out_dir = tiny_run()
    with (out_dir / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 1')
    assert report.read_log(out_dir / "log.jsonl")[-1]["step"] == 12


def test_a_new_run_does_not_cost_an_earlier_one(tiny_run, capsys):
    contents = []
    for _ in range(3):
        contents.append((tiny_run(seed=len(contents)) / "ckpt.pt").read_bytes())
    assert "the earlier run in out/tiny is now in out/tiny.2" in capsys.readouterr().out
    assert [
        Path(f"out/{name}/ckpt.pt").read_bytes() for name in ("tiny.1", "tiny.2", "tiny")
    ] == contents


def test_speed_is_that_of_the_steps_since_the_last_line_or_evaluation(tiny_run, monkeypatch):
    clock = iter(range(10_000))
    monkeypatch.setattr(report.time, "perf_counter", lambda: float(next(clock)))
    steps = report.read_log(tiny_run(log_interval=4, eval_interval=6) / "log.jsonl")
    speeds = {r["step"]: r["tokens_per_second"] for r in steps if "tokens_per_second" in r}
    assert speeds.keys() == {4, 8, 12}
    assert speeds[8] <= speeds[4]  # two steps since the evaluation at 6, in no less time


# Signals, and many processes


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals to send to another process")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(tiny_run, name):
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
    assert step >= 20 and f"step {step}" in lines[-1]


@pytest.mark.parametrize(
    "changed", [{"optimizer": "adamw"}, {"optimizer": "muon"}, {"compile": True}], ids=str
)
def test_two_processes_are_one(tiny_run, changed):
    common = {"dtype": "float32", "dropout": 0.1, "gradient_accumulation_steps": 4, **changed}
    one = tiny_run(
        out_dir="out/one",
        **{**common, "compile": False, "dropout": 0.0 if "compile" in changed else 0.1},
    )
    args = options(
        tiny_run, out_dir="out/two", **{**common, "dropout": 0.0 if "compile" in changed else 0.1}
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, ROOT / "train.py", *args], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("parameters:") == 1
    assert ("\ncompiled in" in done.stdout) is ("compile" in changed)
    a, b = logged(one), logged(Path("out/two"))
    assert len(a) == len(b)
    for ours, theirs in zip(a, b, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    weights = [
        load_checkpoint(Path("out") / name / "ckpt.pt")[1]["model"] for name in ("one", "two")
    ]
    # Muon's products are in bfloat16, which makes more of a difference in the last digits of a gradient.
    torch.testing.assert_close(
        *weights, rtol=1e-2, atol=1e-2 if changed.get("optimizer") == "muon" else 1e-3
    )


def test_accumulation_that_can_not_be_divided_says_what_to_set(tiny_run, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(
        UserError,
        match="gradient_accumulation_steps=2 can not be divided among 4 processes; set it to a",
    ):
        tiny_run()


# What a run refuses


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tiny_run, monkeypatch):
    taken = train.Trainer.train_step

    def poison_step_8(trainer, step, *args):
        if step == 8:
            with torch.no_grad():
                trainer.model.transformer.wpe.weight[3, 3] = float("inf")
        return taken(trainer, step, *args)

    monkeypatch.setattr(train.Trainer, "train_step", poison_step_8)
    with pytest.raises(UserError, match=r"step 8: the loss is nan, .* learning rate 0\.00"):
        tiny_run()
    kept = load_checkpoint(Path("out/tiny/ckpt.pt"))[1]
    assert kept["step"] == 6 and all(p.isfinite().all() for p in kept["model"].values())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_loss_that_is_not_finite_is_named_however_late_it_is_read_and_changes_no_weight(
    tiny_run, optimizer
):
    """On a GPU the figures of a step are read at the next line of the log."""
    config = read_options(train.TrainConfig, options(tiny_run, optimizer=optimizer))
    trainer = train.Trainer(config, train.Processes(config))
    for step in range(6):
        before = {name: p.clone() for name, p in trainer.model.named_parameters()}
        if step == 3:
            trainer.model.transformer.wpe.weight.data[3, 3] = math.inf
            before["transformer.wpe.weight"][3, 3] = math.inf
        figures = trainer.train_step(step, lr=0.01)
        after = dict(trainer.model.named_parameters())
        moved = [name for name, p in before.items() if not torch.equal(p, after[name])]
        assert moved == (list(before) if step < 3 else [])
    with pytest.raises(UserError, match=r"step 3: the loss is nan, .* after norms of [\d.e, -]+; "):
        trainer.read(figures)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"n_embd": 32}, "n_embd=16 and this run has n_embd=32"),
        ({"optimizer": "muon"}, "optimizer=adamw and this run has optimizer=muon"),
        ({"out_dir": "out/none"}, "no such checkpoint"),
        ({"max_iters": 5}, "is at step 12, beyond max_iters=5"),
    ],
)
def test_resume_names_what_contradicts_the_checkpoint(tiny_run, changed, words):
    tiny_run()
    with pytest.raises(UserError, match=words):
        tiny_run(init_from="resume", **changed)


def test_resume_on_other_data_is_refused(tiny_run):
    import prepare_shakespeare

    tiny_run()
    Path("tiny.txt").write_text(TEXT.replace("times", "emits"), encoding="utf-8")
    prepare_shakespeare.main(prepare_shakespeare.PrepareConfig(input="tiny.txt", dataset="tiny"))
    with pytest.raises(UserError, match=r"was made with train\.bin="):
        tiny_run(init_from="resume")


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--batch_size=0", "batch_size is 0 but must be at least 1"),
        ("--dropout=1", "dropout is 1.0 but must be at least 0 and below 1"),
        ("--weight_decay=-0.1", "weight_decay is -0.1 but must be at least 0"),
        ("--learning_rate=0", "learning_rate is 0.0 but must be above 0"),
        ("--n_head=7", "n_embd=768 can not be split among n_head=7"),
        ("--min_lr=1", "min_lr=1.0 is above learning_rate=0.0006"),
        ("--sample_interval=3", "choose a multiple of eval_interval=2000"),
        ("--seed=99999999999999999999", "at most 2"),
    ],
)
def test_options_out_of_range_are_refused(argument, words):
    with pytest.raises(UserError, match=words):
        read_options(train.TrainConfig, [argument])


def test_mistakes_at_run_time_end_in_one_line_with_exit_code_1(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", "--dataset=nowhere"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert (
        done.stderr.startswith("error: data")
        and "prepare" in done.stderr
        and done.stderr.count("\n") == 1
    )
    assert not list(tmp_path.iterdir())


def test_prompt_outside_of_the_vocabulary_is_refused_before_training(tiny_run):
    with pytest.raises(UserError, match="'ROMEO': character 'R' at position 0"):
        tiny_run(sample_interval=6, sample_start="ROMEO")
    assert not Path("out").exists()


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_missing_package_for_watching_ends_in_one_line(tiny_run, monkeypatch, name):
    for module in [
        m for m in sys.modules if m.split(".")[0] == name or m.startswith("torch.utils.tensorboard")
    ]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f"pip install {name}"):
        tiny_run(**{f"{name}_log": True})


def test_tensorboard_gets_what_the_log_gets(tiny_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out_dir = tiny_run(tensorboard_log=True, sample_interval=6)
    events = EventAccumulator(str(out_dir))
    events.Reload()
    for name in ("loss", "val_loss", "lr"):
        logged = [(r["step"], r[name]) for r in report.read_log(out_dir / "log.jsonl") if name in r]
        assert [(e.step, e.value) for e in events.Scalars(name)] == [
            (s, pytest.approx(v, rel=1e-6)) for s, v in logged
        ]
    assert events.Tags()["tensors"] == ["sample/text_summary"]


def test_wandb_gets_what_the_log_gets(tiny_run, monkeypatch):
    calls = []
    run = type(
        "Run",
        (),
        {"log": lambda _, figures, step: calls.append((step, figures)), "finish": lambda _: None},
    )()
    monkeypatch.setitem(
        sys.modules, "wandb", type("wandb", (), {"init": staticmethod(lambda **_: run)})
    )
    out_dir = tiny_run(wandb_log=True)
    records = report.read_log(out_dir / "log.jsonl")
    assert [
        (r.pop("step"), r) for r in records if r.pop("epoch") >= 0 and r.pop("seconds") >= 0
    ] == calls


# Device, dtype and compile


def test_device_and_dtype_are_resolved(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert runtime.resolve_device("auto").type == "cuda"
    assert runtime.resolve_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UserError, match="'cuda:2': torch finds 2"):
        runtime.resolve_device("cuda:2")
    with pytest.raises(UserError, match="'gpu': not a device"):
        runtime.resolve_device("gpu")
    for native in (True, False):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native
        )
        expected = torch.bfloat16 if native else torch.float32
        assert runtime.resolve_dtype("auto", torch.device("cuda")) == expected
        monkeypatch.setattr(
            torch.cpu,
            "get_capabilities",
            lambda native=native: {"avx2": True, "avx512_bf16": native},
        )
        assert runtime.resolve_dtype("auto", CPU) == expected
    assert runtime.resolve_dtype("float16", CPU) == torch.float16
    assert runtime.resolve_dtype("auto", torch.device("mps")) == torch.float32


def test_compile_auto_is_for_long_runs_where_a_compiler_is(monkeypatch):
    monkeypatch.setattr(runtime.shutil, "which", lambda _: "/usr/bin/c++")
    assert runtime.why_not_compile("auto", CPU, 5000) == ""
    assert "few steps" in runtime.why_not_compile("auto", CPU, 50)
    assert runtime.why_not_compile(True, CPU, 50) == ""
    assert runtime.why_not_compile(False, CPU, 5000) == "asked for"
    monkeypatch.setattr(runtime.shutil, "which", lambda _: None)
    assert "compiler" in runtime.why_not_compile("auto", CPU, 5000)
    monkeypatch.setattr(runtime.platform, "system", lambda: "Windows")
    assert "Triton" in runtime.why_not_compile("auto", torch.device("cuda"), 5000)


def test_a_run_goes_on_uncompiled_when_compilation_fails(tiny_run, monkeypatch, capsys):
    def broken(_model):
        def call(*_):
            raise RuntimeError("no compiler here\nand more")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    out_dir = tiny_run(compile=True)
    assert "not compiled: RuntimeError: no compiler here\n" in capsys.readouterr().out
    assert logged(out_dir)[-1]["step"] == 12


def test_compiled_and_plain_runs_have_the_same_losses(tiny_run, capsys):
    plain = logged(tiny_run(out_dir="out/plain", dtype="float32"))
    capsys.readouterr()
    compiled = logged(tiny_run(out_dir="out/compiled", dtype="float32", compile=True))
    assert "\ncompiled in" in capsys.readouterr().out
    for a, b in zip(plain, compiled, strict=True):
        assert a == pytest.approx(b, rel=1e-3)


def test_float32_and_bfloat16_runs_agree(tiny_run):
    full = logged(tiny_run(out_dir="out/full", dtype="float32"))
    half = logged(tiny_run(out_dir="out/half", dtype="bfloat16"))
    for a, b in zip(full, half, strict=True):
        assert a.get("val_loss", 0) == pytest.approx(b.get("val_loss", 0), rel=1e-2)
    assert full != half


def test_progress_is_lines_where_output_is_no_terminal(tiny_run, capsys):
    tiny_run()
    printed = capsys.readouterr()
    assert (
        all(part in printed.out for part in ("| loss ", "tokens/s", "left")) and printed.err == ""
    )


@pytest.mark.skipif(os.name == "nt", reason="a terminal for a test is POSIX's to give")
def test_progress_is_a_bar_on_a_terminal(tiny_run):
    import fcntl
    import pty
    import termios

    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))
    command = [sys.executable, ROOT / "train.py", *options(tiny_run)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=child, text=True)
    os.close(child)
    shown = b""
    while chunk := read_terminal(parent):
        shown += chunk
    out = process.communicate(timeout=120)[0]
    assert process.returncode == 0
    assert b"12/12" in shown and b"loss" in shown and b"tokens/s" in shown
    assert "tokens/s" not in out and "validation loss" in out


def read_terminal(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # how Linux says that the other end is closed
        return b""


def test_json_log_has_the_documented_keys(tiny_run):
    lines = (tiny_run() / "log.jsonl").read_text(encoding="utf-8").splitlines()
    step = {"step", "epoch", "seconds", "loss", "grad_norm", "lr", "tokens_per_second"}
    evaluation = {"step", "epoch", "seconds", "train_loss", "val_loss"}
    assert {frozenset(json.loads(line)) for line in lines} == {
        frozenset(step),
        frozenset(evaluation),
    }
