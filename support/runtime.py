"""Where and how the arithmetic runs: device, dtype, torch.compile, memory, signals."""

import ctypes
import os
import platform
import re
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from configurator import UserError

ROOT = Path(__file__).parent.parent


def resolve_device(name: str) -> torch.device:
    """Return the device called `name`; 'auto' is CUDA, or Apple's mps, or the CPU."""
    has_mps = torch.backends.mps.is_available()
    counts = {"cuda": torch.cuda.device_count(), "mps": int(has_mps), "cpu": 1}
    if name == "auto":
        name = next(kind for kind, count in counts.items() if count)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device={name} is not a device; use auto, cpu, cuda or mps") from None
    count = counts.get(device.type, 0)
    if (device.index or 0) >= count:
        raise UserError(f"device={name}: torch finds {count} of these here; use --device=auto")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype called `name`; 'auto' is bfloat16 where that is fast, else float32.

    An old GPU gets float32, too: float16 can overflow, so it must be asked for.
    """
    if name != "auto":
        return getattr(torch, name)
    fast = False  # Apple's GPU computes bfloat16 no faster than float32
    if device.type == "cuda":  # bfloat16 in hardware came with Ampere, compute capability 8
        fast = torch.cuda.get_device_capability(device)[0] >= 8
    elif device.type == "cpu":
        features = torch.cpu.get_capabilities()  # of x86 and of ARM
        fast = any(features.get(key) for key in ("amx_bf16", "bf16", "sve_bf16"))
        # Intel's AVX-512 multiplies in bfloat16 half as fast as in float32, AMD's twice as fast.
        intel = "Intel" in features.get("cpu_name", "")
        fast = fast or (features.get("avx512_bf16", False) and not intel)
    return torch.bfloat16 if fast else torch.float32


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
        advice = "use a smaller model, block_size or batch, or --device=cpu"
        if batch_size > 1:
            advice = (
                f"divide batch_size={batch_size} and multiply gradient_accumulation_steps="
                f"{accumulation} by the same factor: the result is the same"
            )
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f.name for f in frames if Path(f.filename).is_relative_to(ROOT)]
        amount = re.search(r"allocate ([\d.]+ \w+)", str(error))
        what = f"out of memory in {ours[-1]}" + (f", for {amount[1]}" if amount else "")
        raise UserError(f"{what}; {advice}") from error


def compile_model(model: nn.Module, config, batch: tuple, precision, processes) -> Callable:
    """Return the compiled model or, where that fails or does not pay, the model as it is.

    A forward and backward pass over `batch`, x and y, shows whether it can be compiled.
    """
    # By the steps of the whole run, so that a run which is resumed near its end computes the same.
    option, steps = config.compile, config.max_iters
    compiled, reason, started = model, "--compile=False", time.perf_counter()
    if option == "auto" and steps < 1000:
        reason = f"compiling takes longer than {steps} steps save"
    elif option == "auto" and processes.device.type == "mps":
        reason = "not tested on Apple's GPU; try --compile=True"
    elif option:
        processes.say("compiling the model (about 30 s) ...")
        compiled, reason = torch.compile(model), ""
        # Without exchanging gradients: a process that can not compile would keep others waiting.
        alone = model.no_sync() if processes.distributed else nullcontext()
        try:
            with alone:
                with precision:
                    loss = compiled(*batch)[1]
                loss.backward()
        except Exception as error:  # a missing compiler or header, an unsupported processor, ...
            torch.compiler.reset()
            lines = (str(error).strip() or "no reason").splitlines()
            reason = f"{type(error).__name__}: {lines[0][:100]}"
        model.zero_grad(set_to_none=True)
    reasons = list(filter(None, processes.gather(reason)))
    seconds = time.perf_counter() - started
    processes.say(f"not compiled: {reasons[0]}" if reasons else f"compiled in {seconds:.0f} s")
    return model if reasons else compiled  # if one process can not compile, none does


@contextmanager
def catch_signals() -> Iterator[list[int]]:
    """Yield a list that gets the number of each SIGINT, SIGTERM or SIGHUP that arrives inside.

    So a run can finish its step and save. A second Ctrl-C ends the process at once.
    """
    received: list[int] = []

    def receive(number: int, _frame) -> None:
        received.append(number)
        if number == signal.SIGINT:
            signal.signal(number, before[number])
            # Not print(): the signal may interrupt another print.
            with suppress(OSError):  # the reader of a pipe has ended
                os.write(1, b"\nstopping after this step or evaluation; Ctrl-C again: at once\n")

    hang_up = getattr(signal, "SIGHUP", signal.SIGTERM)  # Windows has no SIGHUP
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, hang_up)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # nohup ignores SIGHUP, and that must stay so
            signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
