"""Where and how the arithmetic runs: device, dtype, torch.compile, memory, signals."""

import ctypes
import os
import platform
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from configurator import UserError
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress

import psutil
import torch
from torch import Tensor, nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """Return the device called `name`; 'auto' is CUDA, or Apple's mps, or the CPU."""
    if name == "auto":
        has_mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(
            f"device={name} is not a device; use auto, cpu, cuda, cuda:1 or mps"
        ) from None
    counts = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }
    count = counts.get(device.type, 0)
    if (device.index or 0) >= count:
        raise UserError(f"device={name}: torch finds {count} of these here; use --device=auto")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype called `name`; 'auto' is bfloat16 where that is fast, else float32.

    An old GPU gets float32, too: float16 can overflow, so it must be asked for.
    """
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":  # bfloat16 in hardware came with Ampere, compute capability 8
        fast = torch.cuda.get_device_capability(device)[0] >= 8
    elif device.type == "cpu":
        features = torch.cpu.get_capabilities()  # of x86 and of ARM
        fast = any(features.get(key) for key in ("amx_bf16", "bf16", "sve_bf16"))
        # Intel's AVX-512 multiplies in bfloat16 half as fast as in float32, AMD's twice as fast.
        intel = "Intel" in features.get("cpu_name", "")
        fast = fast or (features.get("avx512_bf16", False) and not intel)
    else:
        fast = False  # Apple's GPU computes bfloat16 no faster than float32
    return torch.bfloat16 if fast else torch.float32


def is_slow(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether `dtype` is bfloat16 and `device` a CPU that is faster in float32.

    One with AVX2 alone computes bfloat16 in software: large products take 400 times as long.
    """
    on_cpu = device.type == "cpu"
    return on_cpu and dtype == torch.bfloat16 != resolve_dtype("auto", device)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name that the option has: bfloat16, not torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Return a context in which matrix products run in `dtype` and sums stay in float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def set_up(device: torch.device, deterministic: bool = False) -> None:
    """Make training on `device` fast and, on a CPU or if `deterministic`, the same in every run.

    On a GPU the gradient of the embeddings is otherwise added up in any order.
    """
    if device.type == "cuda":
        # TF32 for products of float32: eight times as fast on an A100 (NVIDIA's data sheet).
        torch.set_float32_matmul_precision("high")
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cpu" or deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it for this
        torch.use_deterministic_algorithms(True)
        # Filling new tensors finds bugs, but costs time.
        torch.utils.deterministic.fill_uninitialized_memory = False


def keep_freed_memory() -> None:
    """Make glibc keep the memory of one training step for the next.

    By default it returns large blocks to the system, which clears every page before the next use: a
    quarter of the time of phase 1 on a CPU. Other systems' allocators are left alone.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt  # mallopt(3)
        if mallopt(-3, 1 << 30):  # M_MMAP_THRESHOLD: never; older versions refuse
            mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD: never
            mallopt(-2, 1 << 28)  # M_TOP_PAD: few but large requests to the system


class PackedLinear(nn.Module):
    """A linear layer, for inference only, with its weights in the order that oneDNN reads fastest.

    The two operations are torch's own but undocumented: torch.compile uses them.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def pack_weights(model: nn.Module) -> None:
    """Pack the large matrices of a model on an x86 CPU, so that it writes faster.

    A packed model can not be trained or saved. Each token that is written reads all weights once:
    packed at 19 to 28 GB/s, otherwise at 12 to 18. A small matrix stays in the processor's cache.
    """
    weight = next(model.parameters())
    on_x86 = weight.device.type == "cpu" and platform.machine().lower() in ("x86_64", "amd64")
    native = weight.dtype in (torch.float32, resolve_dtype("auto", weight.device))
    if not (on_x86 and native and torch.backends.mkldnn.is_available()):
        return
    for parent in [m for m in model.modules() if not isinstance(m, nn.Linear)]:
        for name, layer in parent.named_children():
            if isinstance(layer, nn.Linear) and layer.weight.numel() > 100_000:
                setattr(parent, name, PackedLinear(layer))


def peak_memory(device: torch.device) -> int:
    """Return the most bytes in use so far: on a GPU by tensors, elsewhere by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if platform.system() == "Windows":
        return psutil.Process().memory_info().peak_wset
    import resource  # Windows does not have it

    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextmanager
def explain_out_of_memory(batch_size: int = 0, accumulation: int = 0) -> Iterator[None]:
    """Turn every out-of-memory error inside into a UserError that says what to change.

    `batch_size` and `accumulation` are the options of a training.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # As a CPU says it, also on Windows; as CUDA and mps do; and mps of a single large tensor.
        words = ("allocate memory", "not enough memory", "out of memory", "Invalid buffer size")
        if not isinstance(error, MemoryError) and not any(w in str(error) for w in words):
            raise
        message = "out of memory; use a smaller model, block_size or batch, or --device=cpu"
        if batch_size > 1:
            message = (
                f"out of memory at batch_size={batch_size}; divide it and multiply "
                f"gradient_accumulation_steps={accumulation} by the same factor: the result is the "
                "same"
            )
        raise UserError(message) from error


def why_not_compile(option: bool | str, device: torch.device, steps: int) -> str:
    """Return the reason not to use torch.compile, or "". 'auto' compiles where that pays."""
    if option != "auto":
        return "" if option else "--compile=False"
    if steps < 1000:
        return f"compiling takes longer than {steps} steps save"
    if device.type == "mps":
        return "torch.compile is not ready for Apple's GPU"
    if device.type == "cuda" and platform.system() == "Windows":
        return "Triton has no Windows build"
    if device.type == "cpu" and not any(
        map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++", "cl"))
    ):
        return "no C++ compiler found"
    return ""


def compile_model(trainer, say: Callable[[str], None] = print) -> str:
    """Wrap trainer.model for its processes, compile it, and set trainer.ddp and trainer.step_model.

    Returns a line about the result. A model that can not be compiled is used as it is.
    """
    started = time.perf_counter()
    trainer.ddp = trainer.step_model = trainer.processes.wrap(trainer.model)
    # Decided by the length of the whole run, so that a run resumed near its end computes the same.
    config = trainer.config
    reason = why_not_compile(config.compile, trainer.device, config.max_iters)
    if reason:
        return f"not compiled: {reason}"
    say("compiling the model (about 30 s) ...")
    trainer.step_model = torch.compile(trainer.ddp)
    try:
        try_out(trainer)
    except Exception as error:  # a missing compiler or header, an unsupported processor, ...
        torch.compiler.reset()
        reason = (
            f"{type(error).__name__}: {(str(error).strip() or 'no reason').splitlines()[0][:100]}"
        )
    reasons = [reason for reason in trainer.processes.gather(reason) if reason]
    if reasons:  # if one process can not compile, none does
        trainer.step_model = trainer.ddp
        return f"not compiled: {reasons[0]}"
    return f"compiled in {time.perf_counter() - started:.0f} s"


def try_out(trainer) -> None:
    """Run one forward and backward pass, in which a compiled model is compiled."""
    x, y = trainer.micro_batch(step=0, micro=0)
    no_exchange = trainer.ddp.no_sync() if trainer.processes.distributed else nullcontext()
    try:
        with no_exchange:
            with autocast(trainer.device, trainer.dtype):
                loss = trainer.step_model(x, y)[1]
            loss.backward()
    finally:
        trainer.model.zero_grad(set_to_none=True)


def median_seconds(function: Callable, device: torch.device, at_most: float = 10) -> float:
    """Return the median time of five calls, or of as many as begin within `at_most` seconds."""
    seconds = []
    while len(seconds) < 5 and sum(seconds) < at_most:
        started = now(device)
        function()
        seconds.append(now(device) - started)
    return sorted(seconds)[len(seconds) // 2]


def now(device: torch.device) -> float:
    """Return the time in seconds at which `device` has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


class StopSignal:
    """Inside the block, SIGINT, SIGTERM and SIGHUP only set `number` (0: no signal yet).

    So the run can finish its step and save. A second Ctrl-C ends the process at once.
    """

    def __enter__(self) -> "StopSignal":
        self.number = 0
        names = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
        numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
        self.before = {n: signal.getsignal(n) for n in numbers}
        for n, handler in self.before.items():
            if handler != signal.SIG_IGN:  # nohup ignores SIGHUP, and that must stay so
                signal.signal(n, self.receive)
        return self

    def __exit__(self, *_) -> None:
        for n, handler in self.before.items():
            signal.signal(n, handler)

    def receive(self, number: int, _frame) -> None:
        if self.number == number == signal.SIGINT:
            os._exit(128 + number)
        self.number = number
        if number == signal.SIGINT:  # not print(): the signal may interrupt another print
            with suppress(OSError):  # the reader of a pipe has ended
                os.write(1, b"\nstopping after this step; press Ctrl-C again to stop at once\n")
