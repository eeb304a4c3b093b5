"""A sound run passes the preflight. Each fault fails its own check and no other."""

import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import options
from torch.nn import functional as F

import model
import train
from configurator import UserError
from model import GPT, GPTConfig
from support import data, runtime
from support.tokenizer import CharTokenizer
from tools import preflight
from tools.preflight import PreflightConfig, main

NAMES = ["targets", "text", "data", "files", "disk", "initial loss", "precision", "gradients"]
NAMES += ["the future", "positions", "one batch by heart"]


@pytest.fixture
def failing(tiny_run, monkeypatch, capsys):
    """A function: run the checks with the options of tiny_run and return the names that fail."""
    monkeypatch.setattr(preflight, "print_bill", lambda *_: print("the bill"))

    def check(**changed) -> set[str]:
        failed = []
        try:
            main(PreflightConfig(**tiny_run.options | changed))
        except UserError as error:
            words = re.fullmatch("preflight: (.*) failed; correct this .*", str(error))[1]
            failed = words.split(" and ")
        lines = capsys.readouterr().out.split("checking data/tiny ...\n")[1].splitlines()
        found = dict(re.fullmatch("(ok  |FAIL) (.*?): .+", s).group(2, 1) for s in lines[:11])
        assert list(found) == NAMES and lines[11:] == ["the bill"] * (not failed)
        assert failed == [name for name in NAMES if found[name] == "FAIL"]
        return set(failed)

    return check


def test_a_sound_run_passes(failing):
    assert failing() == set()
    assert failing(dtype="bfloat16", tie_weights=False, bias=False, dropout=0.5) == set()


def overflow(mlp) -> None:
    mlp.c_fc.weight.data.mul_(1e7)
    mlp.c_proj.weight.data.mul_(1e-7)


@pytest.mark.parametrize(
    ("check", "change", "changed"),
    [
        ("initial loss", lambda m: m.lm_head.weight.data.mul_(100), {"tie_weights": False}),
        ("gradients", lambda m: m.transformer.h[1].mlp.c_fc.bias.requires_grad_(False), {}),
        ("positions", lambda m: m.transformer.wpe.weight.data.zero_(), {}),
        ("precision", lambda m: overflow(m.transformer.h[0].mlp), {"dtype": "float16"}),
    ],
)
def test_a_fault_of_the_weights_fails(failing, monkeypatch, check, change, changed):
    draw = GPT.init_weights
    monkeypatch.setattr(GPT, "init_weights", lambda self: (draw(self), change(self)))
    assert failing(**changed) == {check}


@pytest.mark.parametrize(
    "seen", [torch.ones(16, 16), torch.ones(16, 16).tril(1), torch.eye(16)], ids=len
)
def test_a_mask_that_shows_too_much_or_too_little_fails(failing, monkeypatch, seen):
    def attention(q, k, v, _dropout):
        scores, T = q @ k.mT / q.size(3) ** 0.5, q.size(2)
        return scores.masked_fill(seen[:T, :T] == 0, -1e9).softmax(dim=-1) @ v

    monkeypatch.setattr(model, "attention", attention)
    assert failing() == {"the future"}


def test_a_loss_that_can_not_be_learned_fails(failing, monkeypatch):
    loss = F.cross_entropy
    shuffled = lambda a, b, **c: loss(a, b[torch.randperm(len(b))], **c)  # noqa: E731
    monkeypatch.setattr(F, "cross_entropy", shuffled)
    assert failing() == {"one batch by heart"}


def test_a_fault_of_the_data_fails(failing, dataset, monkeypatch):
    def rewrite(tokenizer, ids: list, val: list) -> None:
        data.write_dataset(dataset, tokenizer, ids, val, len(val), {"file": "test"})

    _, tokenizer, tokens, val = data.open_dataset(dataset)
    ids, random = tokens.open().tolist(), np.random.default_rng(0).integers(0, 32, 5000).tolist()
    rewrite(tokenizer, ids, val.open().tolist() + ids[1000:1800])  # also training text
    assert failing() == {"data"}
    rewrite(CharTokenizer("".join(map(chr, range(32)))), random[:4000], random[4000:])
    assert failing() == {"text"}
    for name in ("train.bin", "val.bin"):
        rewrite(tokenizer, ids[:6000], ids[6000:])
        content = (dataset / name).read_bytes()
        (dataset / name).write_bytes(content[2:] + content[:2])
        assert failing() == {"files"}
    load, read = train.load_batch, lambda t: np.memmap(t.file, dtype=np.uint8, mode="r")
    monkeypatch.setattr(preflight, "free_bytes", lambda _: 10_000)
    monkeypatch.setattr(train, "load_batch", lambda *args: (load(*args)[0],) * 2)
    rewrite(tokenizer, ids[:6000], ids[6000:])
    assert {"targets", "disk"} <= failing()
    monkeypatch.setattr(data.Tokens, "open", read)
    assert "files" in failing()


def test_the_command_prints_checks_and_a_bill_and_leaves_a_run_as_it_is(tiny_run):
    out_dir = tiny_run()
    before = {path: path.read_bytes() for path in out_dir.iterdir()}
    changed = options(tiny_run, init_from="auto", max_iters=7, dollars_per_hour=2)
    command = [sys.executable, "-m", "tools.preflight", *changed]
    lines = subprocess.check_output(command, text=True).splitlines()
    assert [line[5:].split(":")[0] for line in lines[1:12]] == NAMES
    assert lines[12:14] == ["not compiled: --compile=False", "measuring a few training steps ..."]
    assert re.fullmatch(r"this machine, .*: 0:0\d:\d\d hours, \$0\.\d\d", lines[16])
    assert {path: path.read_bytes() for path in out_dir.iterdir()} == before


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        ("data/no/meta.json: no such file", {"dataset": "no"}),
        ("too few for block_size=4096", {"block_size": 4096}),
        ("'Z'", {"sample_interval": 1, "sample_start": "Z"}),
        ("needs a single process; run it without torchrun", {}),
    ],
)
def test_what_can_not_be_checked_ends_in_one_line(tiny_run, monkeypatch, words, changed):
    if not changed:
        monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match=words):
        main(PreflightConfig(**tiny_run.options | changed))


@pytest.fixture
def bill(monkeypatch, capsys):
    """A function: return the bill, given the seconds of what it measures, and some options."""

    def make(batch=0.0, one_pass=1.0, update=0.0, kind="cpu", **changed) -> str:
        times = iter((batch, one_pass, update))
        monkeypatch.setattr(preflight, "median_seconds", lambda *_: next(times))
        config = PreflightConfig(**{"batch_size": 4, "compile": False, **changed})
        processes = SimpleNamespace(device=torch.device(kind), say=print, gather=lambda s: [s])
        tiny = GPT(GPTConfig(18, n_layer=2, n_head=2, n_embd=16, block_size=16))
        preflight.print_bill(config, tiny, lambda: torch.zeros(2, 4, 16).long(), 6454, processes)
        return capsys.readouterr().out

    return make


def test_the_bill_counts_tokens_operations_seconds_and_money(bill, monkeypatch):
    text = bill(one_pass=3, update=1, gradient_accumulation_steps=10, max_iters=7200)
    weights = 2 * 12 * 16 * 16 + 18 * 16  # of the linear layers (Kaplan et al. 2020)
    flops = (6 * weights + 12 * 2 * 16 * 16) * 7200 * 640
    assert "; 4,608,000 tokens in 7,200 steps of 640: 713.98 epochs, " in text
    assert "\n31.000 s per step, 21 tokens/s, " in text
    assert f"; {flops:.3g} operations in the whole run\n" in text
    assert "\nthis machine, measured without evaluations: 2 days, 14:00:00 hours\n" in text
    assert "\nA100, estimated at 40% of its peak: 0:00:01 hours\n" in text
    assert "warning" not in text and "$" not in text
    per_token = 0.4 * 312e12 * 3599.5 / (1000 * 64)  # almost an hour on an A100
    monkeypatch.setattr(GPT, "flops_per_token", lambda *_: per_token)
    text = bill(gradient_accumulation_steps=1, max_iters=1000, dollars_per_hour=2.0)
    assert re.findall("peak: (.*)", text) == ["1:00:00 hours, $2.00", "0:18:56 hours, $0.63"]


def test_the_bill_includes_the_memory_of_an_evaluation(bill, monkeypatch):
    calls, forward = [], GPT.forward

    def spy(model: GPT, x, y):
        calls.append((tuple(x.shape), model.training, torch.is_grad_enabled()))
        return forward(model, x, y)

    monkeypatch.setattr(GPT, "forward", spy)
    bill()
    assert calls == [((4, 16), False, False)]


@pytest.mark.parametrize(
    ("best", "changed", "warned"),
    [
        ("bfloat16", {"dtype": "float32"}, "bfloat16 is faster on this device; use --dtype=auto"),
        ("float32", {"dtype": "bfloat16"}, "float32 is faster on this device; use --dtype=auto"),
        ("bfloat16", {"dtype": "float16", "batch": 0.04}, ""),
        ("float32", {"batch": 0.1}, "batches take 10% of the time"),
    ],
)
def test_what_slows_a_run_down_is_a_warning(bill, monkeypatch, best, changed, warned):
    monkeypatch.setattr(
        runtime, "resolve_dtype", lambda name, _: getattr(torch, best if name == "auto" else name)
    )
    assert re.findall("warning: (.*)", bill(**changed)) == [warned] * bool(warned)
