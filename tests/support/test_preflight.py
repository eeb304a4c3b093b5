"""A sound run passes preflight. Each fault fails its own check and no other."""

import io
import subprocess
import sys
from configurator import UserError
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, options
from torch.nn import functional as F

import model
from support import checkpoint, preflight, runtime
from support.data import Dataset, write_dataset
from support.log import describe
from support.tokenizer import CharTokenizer


def failing(trainer) -> set[str]:
    """Return the names of the checks that fail."""
    trainer.model.eval()
    results = {name: check(trainer) for name, check in preflight.CHECKS.items()}
    assert all("\n" not in measured for _, measured in results.values())
    return {name for name, (ok, _) in results.items() if not ok}


@pytest.mark.parametrize(
    "changed",
    [{}, {"dtype": "bfloat16", "tie_weights": False, "bias": False, "dropout": 0.5}],
    ids=str,
)
def test_a_sound_run_passes_and_keeps_its_weights(tiny_trainer, changed):
    trainer = tiny_trainer(**changed)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    assert failing(trainer) == set()
    for name, p in trainer.model.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None


def test_the_loss_of_a_new_model_that_does_not_guess_evenly_fails(tiny_trainer):
    trainer = tiny_trainer(tie_weights=False)
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(100)
    assert failing(trainer) == {"initial loss"}


def test_a_parameter_without_a_gradient_fails(tiny_trainer):
    trainer = tiny_trainer()
    trainer.model.transformer.h[1].mlp.c_fc.bias.requires_grad_(False)
    assert failing(trainer) == {"gradients"}
    assert "transformer.h.1.mlp.c_fc.bias" in preflight.gradients(trainer)[1]


def test_a_missing_mask_fails(tiny_trainer, monkeypatch):
    def attention_without_mask(q, k, v, _dropout):
        return (q @ k.transpose(2, 3) / q.size(3) ** 0.5).softmax(dim=-1) @ v

    monkeypatch.setattr(model, "attention", attention_without_mask)
    assert failing(tiny_trainer()) == {"the future, by perturbation", "the future, by gradient"}


def test_missing_positions_fail(tiny_trainer):
    trainer = tiny_trainer()
    with torch.no_grad():
        trainer.model.transformer.wpe.weight.zero_()
    assert failing(trainer) == {"positions"}


def test_targets_that_are_the_inputs_fail(tiny_trainer, monkeypatch):
    trainer = tiny_trainer()
    draw = trainer.micro_batch
    monkeypatch.setattr(trainer, "micro_batch", lambda step, micro: (draw(step, micro)[0],) * 2)
    assert "targets" in failing(trainer)


def test_a_loss_that_can_not_be_learned_fails(tiny_trainer, monkeypatch):
    def shuffled(logits, targets, **options):
        return F.cross_entropy(logits, targets[torch.randperm(len(targets))], **options)

    class Functional:
        cross_entropy = staticmethod(shuffled)

        def __getattr__(self, name):
            return getattr(F, name)

    monkeypatch.setattr(model, "F", Functional())
    assert failing(tiny_trainer()) == {"one batch by heart"}


def rewrite(folder: Path, tokenizer, train_ids: list, val_ids: list) -> None:
    write_dataset(folder, tokenizer, train_ids, val_ids, len(val_ids), {"file": "test"})


def test_validation_text_that_is_in_the_training_text_fails(tiny_trainer, dataset):
    data = Dataset(dataset, 16)
    ids = data.train.open().tolist()
    rewrite(dataset, data.tokenizer, ids, ids[1000:1800])
    assert failing(tiny_trainer()) == {"data"}


def test_token_ids_that_do_not_decode_to_text_fail(tiny_trainer, dataset):
    ids = np.random.default_rng(0).integers(0, 32, 5000).tolist()
    rewrite(dataset, CharTokenizer("".join(map(chr, range(32)))), ids[:4000], ids[4000:])
    assert failing(tiny_trainer()) == {"text"}


def test_a_checkpoint_that_is_read_back_different_fails(tiny_trainer, monkeypatch):
    save = torch.save

    def save_altered(value, file):
        value["model"]["lm_head.weight"] = value["model"]["lm_head.weight"] + 1e-3
        save(value, file)

    monkeypatch.setattr(checkpoint.torch, "save", save_altered)
    assert failing(tiny_trainer()) == {"checkpoint"}


def test_a_disk_that_is_too_small_for_the_run_fails(tiny_trainer, monkeypatch):
    monkeypatch.setattr(preflight, "free_bytes", lambda _: 10_000)
    assert failing(tiny_trainer()) == {"checkpoint"}


def test_a_dtype_that_can_not_hold_the_activations_fails(tiny_trainer):
    trainer = tiny_trainer(dtype="float16")
    with torch.no_grad():
        trainer.model.transformer.h[0].mlp.c_fc.weight.mul_(1e7)
        trainer.model.transformer.h[0].mlp.c_proj.weight.mul_(1e-7)
    assert failing(trainer) == {"precision"}


def test_the_command_prints_the_checks_and_the_cost_and_leaves_no_file(tiny_run, capsys):
    tiny_run(preflight=True, max_iters=7200)
    lines = capsys.readouterr().out.splitlines()
    assert "checking data/tiny ..." in lines
    passed = [line[5:].split(":")[0] for line in lines if line.startswith("ok   ")]
    assert passed == list(preflight.CHECKS)
    assert any("921,600 tokens in 7,200 steps of 128" in line for line in lines)
    assert "measuring a few training steps ..." in lines
    assert "warning: not compiled: --compile=False" in lines
    assert not any(Path("out/tiny").iterdir())


def test_preflight_starts_with_new_weights_where_a_run_could_be_resumed(tiny_run, capsys):
    out_dir = tiny_run()
    before = {path: path.read_bytes() for path in out_dir.iterdir()}
    tiny_run(preflight=True, init_from="auto", max_iters=7)
    assert "ok   initial loss" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in out_dir.iterdir()} == before


def test_a_failed_check_ends_the_command_and_prints_no_cost(tiny_run, monkeypatch, capsys):
    monkeypatch.setattr(model.GPT, "init_weights", lambda self: None)
    with pytest.raises(UserError, match="initial loss failed; correct"):
        tiny_run(preflight=True)
    printed = capsys.readouterr().out
    assert "FAIL initial loss" in printed and "estimate" not in printed


def test_each_line_is_printed_before_the_next_check_starts(tiny_trainer, monkeypatch, capsys):
    def fail(_):
        raise UserError("stop here")

    seen = []
    checks = {
        "a": lambda _: (True, "1"),
        "b": lambda _: (seen.append(capsys.readouterr().out), fail(_)),
    }
    monkeypatch.setattr(preflight, "CHECKS", checks)
    with pytest.raises(UserError, match="b failed"):
        preflight.run_checks(tiny_trainer())
    assert seen == ["ok   a: 1\n"]
    assert "FAIL b: stop here" in capsys.readouterr().out


def test_a_context_of_one_token_is_refused(tiny_trainer):
    with pytest.raises(UserError, match="preflight=True needs block_size=2 or more"):
        preflight.run_checks(tiny_trainer(block_size=1))


def test_the_first_line_comes_before_the_data_set_is_read(tiny_run):
    command = [sys.executable, ROOT / "train.py", *options(tiny_run, preflight=True, dataset="no")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "checking data/no ...\n" and done.returncode == 1


def test_a_terminal_shows_which_check_is_running(tiny_trainer, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(preflight, "bill", lambda _: "")
    preflight.run_checks(tiny_trainer())
    assert "...  one batch by heart\rok   one batch by heart: loss" in terminal.getvalue()


# The cost


def test_the_cost_counts_the_operations_of_kaplan(tiny_trainer):
    """6 per weight of the linear layers and 12 n_layer n_embd T per token (Kaplan et al. 2020)."""
    trainer = tiny_trainer(max_iters=1)
    n_weights = sum(
        m.weight.numel() for m in trainer.model.modules() if type(m).__name__ == "Linear"
    )
    flops = (6 * n_weights + 12 * 2 * 16 * 16) * 128
    assert f"{flops:.3g} in the whole run" in preflight.bill(trainer)


def test_estimates_are_operations_by_40_percent_of_the_peak_and_money_is_per_gpu(
    tiny_trainer, monkeypatch
):
    trainer = tiny_trainer(max_iters=1000, dollars_per_hour=2.0)
    per_token = 0.4 * 312e12 * 3600 / (1000 * 128)  # an hour on an A100
    monkeypatch.setattr(model.GPT, "flops_per_token", lambda *_: per_token)
    lines = preflight.bill(trainer).splitlines()
    costs = [line.split(": ", 1)[1] for line in lines if line.startswith("estimate, not measured")]
    assert costs == [
        "1 x A100: 1.0 hours, $2.00",
        "1 x H100: 18.9 minutes, $0.63",
        "8 x H100: 2.4 minutes, $0.63",
    ]
    assert any(line.startswith("measured, without evaluations: this machine") for line in lines)


def test_without_a_price_the_cost_has_no_money(tiny_trainer):
    assert "$" not in preflight.bill(tiny_trainer())


def test_the_time_of_a_step_is_the_first_pass_and_the_others(tiny_trainer, monkeypatch):
    """A step with one pass takes 3 s and with two 5 s, so a step with ten passes takes 21 s."""
    seconds = iter([3.0, 5.0, 0.0])
    monkeypatch.setattr(runtime, "median_seconds", lambda function, *_: next(seconds))
    assert "\n21.000 s per step" in preflight.bill(tiny_trainer(gradient_accumulation_steps=10))


def warned(trainer, compiled: str = "compiled in 9 s") -> list[str]:
    return preflight.warnings(trainer, compiled, pass_seconds=10)


def test_nothing_slow_is_no_warning(tiny_trainer):
    assert warned(tiny_trainer()) == []


def test_what_slows_a_run_down_is_a_warning(tiny_trainer, monkeypatch):
    trainer = tiny_trainer(dtype="float32", max_iters=1000)
    monkeypatch.setattr(runtime, "resolve_dtype", lambda *_: torch.bfloat16)
    assert "use --dtype=auto" in warned(trainer)[0]
    assert warned(trainer, compiled="not compiled: why")[1] == "not compiled: why"
    monkeypatch.setattr(runtime, "median_seconds", lambda *_: 1.0)
    assert warned(trainer)[1] == "batches take 10% of the time; train.bin is in memory"
    trainer.data.train.in_memory = False
    assert warned(trainer)[1].endswith("too large for the memory")


@pytest.mark.parametrize("native", [True, False])
def test_a_cpu_with_slow_bfloat16_is_said_in_every_run_and_a_warning(
    tiny_trainer, monkeypatch, native
):
    trainer = tiny_trainer(dtype="bfloat16")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": native})
    assert ("float32 is faster on this CPU" in describe(trainer)) is not native
    expected = "bfloat16 is slower than float32 on this CPU; use --dtype=auto"
    assert warned(trainer) == ([] if native else [expected])


@pytest.mark.parametrize(
    ("free", "batch", "passes"), [(20, 16, 2), (40, 32, 1), (13, 8, 4), (10, None, None)]
)
def test_a_gpu_with_room_gets_a_larger_batch(tiny_trainer, monkeypatch, free, batch, passes):
    """The model takes 2 bytes and a batch 4; a tenth of the memory stays free."""
    trainer = tiny_trainer(gradient_accumulation_steps=8)
    trainer.device = torch.device("cuda")
    monkeypatch.setattr(runtime, "median_seconds", lambda *_: 0.0)
    monkeypatch.setattr(runtime, "resolve_dtype", lambda *_: trainer.dtype)
    monkeypatch.setattr(runtime, "peak_memory", lambda _: 6)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free - 6, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 6)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 2)
    expected = f"batch_size={batch} and gradient_accumulation_steps={passes} should be faster"
    assert warned(trainer) == ([expected] if batch else [])
