"""Device, dtype, compiling, memory and signals."""

import copy
import os
import platform
import signal
import subprocess
import sys
import time
import types
from configurator import UserError

import pytest
import torch
from conftest import ROOT, logged, options

import sample
import train
from model import GPT, GPTConfig
from support import runtime
from tools import evaluate

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_auto_takes_the_gpu_and_a_device_that_does_not_exist_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert runtime.resolve_device("auto").type == "cuda"
    assert runtime.resolve_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UserError, match="cuda:2: torch finds 2"):
        runtime.resolve_device("cuda:2")
    with pytest.raises(UserError, match="gpu is not a device"):
        runtime.resolve_device("gpu")


@pytest.mark.parametrize(("native", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_auto_takes_bfloat16_where_the_hardware_has_it(monkeypatch, native, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8 if native else 7, 5))
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": native}
    )
    for device in (CUDA, CPU):
        assert runtime.dtype_name(runtime.resolve_dtype("auto", device)) == expected
    assert runtime.resolve_dtype("float16", CPU) == torch.float16
    assert runtime.resolve_dtype("auto", torch.device("mps")) == torch.float32


@pytest.mark.parametrize(
    ("cpu", "amx", "expected"),
    [
        ("AMD EPYC", False, "bfloat16"),
        ("Intel Xeon", True, "bfloat16"),
        ("Intel Xeon", False, "float32"),
    ],
)
def test_auto_takes_bfloat16_on_intel_only_with_amx(monkeypatch, cpu, amx, expected):
    features = {"cpu_name": cpu, "avx512_bf16": True, "amx_bf16": amx}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert runtime.dtype_name(runtime.resolve_dtype("auto", CPU)) == expected
    assert runtime.is_slow(torch.bfloat16, CPU) is (expected == "float32")


def test_compile_auto_is_for_long_runs_with_a_compiler(monkeypatch):
    monkeypatch.setattr(runtime.shutil, "which", lambda _: "/usr/bin/c++")
    assert runtime.why_not_compile("auto", CPU, 5000) == ""
    assert "50 steps" in runtime.why_not_compile("auto", CPU, 50)
    assert runtime.why_not_compile(True, CPU, 50) == ""
    assert runtime.why_not_compile(False, CPU, 5000) == "--compile=False"
    assert "Apple" in runtime.why_not_compile("auto", torch.device("mps"), 5000)
    monkeypatch.setattr(runtime.shutil, "which", lambda _: None)
    assert "compiler" in runtime.why_not_compile("auto", CPU, 5000)
    monkeypatch.setattr(runtime.platform, "system", lambda: "Windows")
    assert "Triton" in runtime.why_not_compile("auto", CUDA, 5000)


def test_a_run_continues_without_compiling_when_that_fails(tiny_run, monkeypatch, capsys):
    def broken(_model):
        def call(*_):
            raise RuntimeError("no compiler here\nand more")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    out_dir = tiny_run(compile=True)
    printed = capsys.readouterr().out
    assert "not compiled: RuntimeError: no compiler here\n" in printed
    assert printed.index("compiling the model") < printed.index("not compiled")
    assert logged(out_dir)[-1]["step"] == 12


@pytest.mark.slow  # compiles for 20 s
def test_compiled_and_plain_runs_have_the_same_losses(tiny_run, capsys):
    run = {"dtype": "float32", "n_layer": 1, "max_iters": 4, "eval_interval": 4}
    plain = logged(tiny_run(**run))
    capsys.readouterr()
    compiled = logged(tiny_run(compile=True, **run))
    assert "\ncompiled in" in capsys.readouterr().out
    for a, b in zip(plain, compiled, strict=True):
        assert a == pytest.approx(b, rel=1e-3)


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
    assert layers(torch.bfloat16) == 0  # see is_slow
    monkeypatch.setattr(runtime.platform, "machine", lambda: "arm64")
    assert layers() == 0


def test_median_seconds_is_the_middle_of_five_calls(monkeypatch):
    now, seconds = [0.0], iter([9.0, 1.0, 2.0, 0.5, 1.5])
    monkeypatch.setattr(runtime, "now", lambda _: now[0])

    def work():
        now[0] += next(seconds)

    assert runtime.median_seconds(work, CPU, at_most=100) == 1.5
    seconds = iter([12.0])
    assert runtime.median_seconds(work, CPU, at_most=10) == 12.0


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), "from the allocator"]
)
def test_running_out_of_memory_says_what_to_set(tiny_run, monkeypatch, error):
    def train_step(*_):
        if isinstance(error, str):
            torch.empty(1 << 55)
        raise error

    monkeypatch.setattr(train.Trainer, "train_step", train_step)
    words = "out of memory at batch_size=4; .* gradient_accumulation_steps=2 by the same factor"
    with pytest.raises(UserError, match=words):
        tiny_run()


@pytest.mark.parametrize("program", [sample, evaluate])
def test_a_model_that_does_not_fit_is_no_traceback(monkeypatch, program):
    monkeypatch.setattr(program, "load_model", lambda *_: torch.empty(1 << 55))
    config = sample.SampleConfig() if program is sample else evaluate.EvaluateConfig()
    with pytest.raises(UserError, match="out of memory; use a smaller model, block_size or batch"):
        program.main(config)


def test_a_batch_of_one_is_not_to_be_divided():
    words = "out of memory; use a smaller model, block_size or batch"
    with pytest.raises(UserError, match=words), runtime.explain_out_of_memory(1, 2):
        raise MemoryError


def test_other_errors_are_not_called_out_of_memory():
    with pytest.raises(RuntimeError, match="shapes"), runtime.explain_out_of_memory(4, 2):
        raise RuntimeError("shapes do not match")


@pytest.mark.parametrize(
    ("system", "peak"), [("Windows", 7), ("Darwin", 3), ("Linux", 3 * 1024)], ids=str
)
def test_peak_memory_is_in_bytes_on_every_system(monkeypatch, system, peak):
    info = types.SimpleNamespace(peak_wset=7)
    process = types.SimpleNamespace(memory_info=lambda: info)
    usage = types.SimpleNamespace(ru_maxrss=3)
    fake = types.SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda _: usage)
    monkeypatch.setattr(runtime.platform, "system", lambda: system)
    monkeypatch.setattr(runtime.psutil, "Process", lambda: process)
    monkeypatch.setitem(sys.modules, "resource", fake)
    assert runtime.peak_memory(CPU) == peak


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no signals to another process")
def test_a_second_interrupt_stops_at_once(tiny_run):
    args = options(tiny_run, max_iters=100_000, eval_interval=100_000)
    code = f"""
import time, train
train_step = train.Trainer.train_step
def slow(trainer, step, *args):
    if step == 5:
        print("waiting", flush=True)
        time.sleep(30)
    return train_step(trainer, step, *args)
train.Trainer.train_step = slow
train.main(train.configure(train.TrainConfig, {args!r}))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line == "waiting\n":
            break
    started = time.perf_counter()
    process.send_signal(signal.SIGINT)
    while "press Ctrl-C again" not in process.stdout.readline():
        assert process.poll() is None  # the first one only asks
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130 and time.perf_counter() - started < 10


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGHUP")
def test_an_ignored_signal_stays_ignored():
    """nohup ignores SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with runtime.StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.number == 0
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.number == signal.SIGTERM
            os.kill(os.getpid(), signal.SIGINT)  # the first Ctrl-C: it must not end this process
            assert stop.number == signal.SIGINT
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_bits_are_the_same_on_a_cpu_after_set_up():
    runtime.set_up(CPU)
    assert torch.are_deterministic_algorithms_enabled()


def test_programs_start_from_any_folder(tmp_path):
    args = [sys.executable, ROOT / "sample.py", "--help"]
    done = subprocess.run(args, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "--out_dir" in done.stdout
