"""Device, dtype, compiling, memory and signals."""

import copy
import os
import platform
import signal
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch

import sample
import train
from configurator import UserError
from model import GPT, GPTConfig
from support import runtime
from support.processes import Processes

CPU = torch.device("cpu")


def test_auto_takes_the_gpu_and_a_device_that_does_not_exist_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert runtime.resolve_device("auto").type == "cuda"
    assert runtime.resolve_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UserError, match="cuda:2: torch finds 2"):
        runtime.resolve_device("cuda:2")


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ({"avx2": True, "avx512_bf16": False}, "float32"),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True}, "bfloat16"),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, "bfloat16"),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, "float32"),
        ({"bf16": True}, "bfloat16"),  # ARM
    ],
)
def test_auto_takes_bfloat16_where_a_processor_is_fast_at_it(monkeypatch, features, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert runtime.dtype_name(runtime.resolve_dtype("auto", CPU)) == expected
    assert runtime.resolve_dtype("float16", CPU) == torch.float16
    assert runtime.resolve_dtype("auto", torch.device("mps")) == torch.float32


@pytest.mark.parametrize(
    ("option", "device", "steps", "reason"),
    [
        (False, "cpu", 5000, "--compile=False"),
        ("auto", "cpu", 999, "compiling takes longer than 999 steps save"),
        ("auto", "mps", 5000, "not tested on Apple's GPU"),
        ("auto", "cpu", 1000, ""),
        (True, "mps", 50, ""),
        (True, "cpu", 50, "RuntimeError: no compiler here\n"),
    ],
)
def test_compile_auto_is_for_long_runs(monkeypatch, capsys, option, device, steps, reason):
    model = GPT(GPTConfig(vocab_size=9, block_size=8, n_layer=1, n_head=1, n_embd=4))

    def compiled(x, y):
        if "no compiler" in reason:
            raise RuntimeError("no compiler here\nand more")
        return model(x, y)

    monkeypatch.setattr(torch, "compile", lambda _: compiled)
    config = train.TrainConfig(compile=option, max_iters=steps)
    processes, batch = Processes("cpu"), (torch.zeros(2, 8, dtype=torch.int64),) * 2
    processes.device = torch.device(device)
    found = runtime.compile_model(model, config, batch, nullcontext(), processes)
    assert found is (model if reason else compiled)
    assert all(p.grad is None for p in model.parameters())
    assert (f"not compiled: {reason}" if reason else "\ncompiled in") in capsys.readouterr().out


def packed_layers(model: GPT) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, runtime.PackedLinear)]


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="only x86 packs weights")
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_model_computes_what_torch_linear_computes(bias):
    torch.manual_seed(0)
    shape = dict(vocab_size=500, block_size=64, n_layer=2, n_head=4, n_embd=256, bias=bias)
    model = GPT(GPTConfig(**shape)).eval()
    for p in model.parameters():  # biases and LayerNorms, too
        torch.nn.init.normal_(p, std=0.05)
    packed = copy.deepcopy(model)
    runtime.pack_weights(packed)
    large = ["attn.c_attn", "mlp.c_fc", "mlp.c_proj"]
    blocks = [f"transformer.h.{i}.{name}" for i in range(2) for name in large]
    assert packed_layers(packed) == [*blocks, "lm_head"]
    for B, T in [(1, 1), (8, 1), (3, 64)]:
        idx = torch.randint(500, (B, T))
        torch.testing.assert_close(packed(idx)[0], model(idx)[0], rtol=1e-4, atol=1e-5)
    texts = [torch.cat(list(m.generate(idx[:, :5], 80, temperature=0))) for m in (model, packed)]
    assert torch.equal(*texts)


def test_weights_are_packed_only_where_that_is_known_to_work(monkeypatch):
    def layers(dtype=torch.float32, device="cpu"):
        model = GPT(GPTConfig(vocab_size=500, n_layer=1, n_embd=256, n_head=4)).to(device, dtype)
        runtime.pack_weights(model)
        return len(packed_layers(model))

    assert layers(torch.float16) == layers(device="meta") == 0
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert layers(torch.bfloat16) == 0  # it is computed in software
    monkeypatch.setattr(runtime.platform, "machine", lambda: "arm64")
    assert layers() == 0


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), "from the allocator"]
)
def test_running_out_of_memory_says_what_to_set(tiny_run, monkeypatch, before_update, error):
    def fail(*_):
        if isinstance(error, str):
            torch.empty(1 << 55)
        raise error

    before_update(fail)
    words = r"out of memory in fail(, for \d+ bytes)?; divide batch_size=4 and multiply gradient_ac"
    with pytest.raises(UserError, match=words):
        tiny_run()
    monkeypatch.setattr(sample, "load_model", fail)
    with pytest.raises(UserError, match=r"out of memory in .*; use a smaller model, block_size or"):
        sample.main(sample.SampleConfig())
    with pytest.raises(UserError, match="use a smaller"), runtime.explain_out_of_memory(1, 2):
        fail()  # a batch of one is not to be divided


def test_another_error_is_not_called_out_of_memory():
    with pytest.raises(RuntimeError, match="shapes"), runtime.explain_out_of_memory(4, 2):
        raise RuntimeError("shapes do not match")


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no signals to another process")
def test_a_second_interrupt_ends_the_process_at_once():
    code = """
import time
from support import runtime
with runtime.catch_signals():
    print("waiting", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    while "Ctrl-C again: at once" not in process.stdout.readline():
        assert process.poll() is None  # the first one only asks
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == -signal.SIGINT


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGHUP")
def test_signals_are_collected_and_an_ignored_one_stays_ignored():
    """nohup ignores SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with runtime.catch_signals() as received:
            for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
                os.kill(os.getpid(), number)
            assert received == [signal.SIGTERM, signal.SIGINT]
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGHUP, before)


def test_bits_are_the_same_on_a_cpu_after_set_up():
    torch.use_deterministic_algorithms(False)
    runtime.set_up(CPU)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory
