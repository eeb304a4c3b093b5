"""Where the arithmetic runs and in which precision: what 'auto' means for device, dtype and compile."""

import ctypes
import os
import platform
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import psutil
import torch

from configurator import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """'auto' is a CUDA GPU, else Apple's, else the CPU; any other name is taken if it is there."""
    if name == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(
            f"device {name!r}: not a device; use auto, cpu, cuda, cuda:1 or mps"
        ) from None
    count = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }
    if (device.index or 0) >= count.get(device.type, 0):
        raise UserError(
            f"device {name!r}: torch finds {count.get(device.type, 0)} of these here; use --device=auto"
        )
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """'auto' is bfloat16 where the device multiplies it natively, else float32.

    An old GPU gets float32 too: float16 overflows, and is for those who ask for it.
    """
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        features = torch.cpu.get_capabilities()  # of x86 and of ARM
        native = any(features.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))
    else:
        native = False  # Apple's GPU has no faster path for it
    return torch.bfloat16 if native else torch.float32


def keep_freed_memory() -> None:
    """Have glibc keep the memory of one training step for the next.

    By default it gives large blocks back, and the system clears each page of them before it is used
    again: a quarter of the time of phase 1 on a CPU. Other systems' allocators are left alone.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt  # mallopt(3)
        if mallopt(-3, 1 << 30):  # M_MMAP_THRESHOLD out of reach; older versions refuse
            mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD out of reach
            mallopt(-2, 1 << 28)  # M_TOP_PAD: few requests to the system, large ones


def peak_memory(device: torch.device) -> int:
    """The most bytes that were in use on a GPU, or, elsewhere, by this process since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if platform.system() == "Windows":
        return psutil.Process().memory_info().peak_wset
    import resource  # which Windows does not have

    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def repeatable() -> None:
    """Have a run on a CPU repeat to the bit: a compiled sum over embeddings is otherwise added up in any order."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = (
        False  # which would cost time, and finds bugs of torch
    )


def dtype_name(dtype: torch.dtype) -> str:
    """As the option has it: bfloat16, not torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Matrix products in `dtype`, everything that needs the digits in float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def why_not_compile(option: bool | str, device: torch.device, steps: int) -> str:
    """Why torch.compile is left out; empty if it is to be used. 'auto' compiles where that pays."""
    if option != "auto":
        return "" if option else "asked for"
    if steps < 1000:
        return "it would take longer than these few steps"
    if device.type == "mps":
        return "not on Apple's GPU"
    if device.type == "cuda" and platform.system() == "Windows":
        return "Triton has no Windows build"
    if device.type == "cpu" and not any(
        map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++", "cl"))
    ):
        return "no C++ compiler found"
    return ""


def compile_model(model: Callable, try_out: Callable[[Callable], object]) -> tuple[Callable, str]:
    """The model (or its forward) compiled, or as it is and why: compilation happens, and fails, in `try_out`."""
    compiled = torch.compile(model)
    try:
        try_out(compiled)
    except Exception as error:  # a missing compiler or header, an unsupported processor, ...
        torch.compiler.reset()
        return (
            model,
            f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0][:100]}",
        )
    return compiled, ""
