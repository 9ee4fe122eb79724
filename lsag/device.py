"""The device that a model runs on, and its setup."""

import ctypes
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from lsag.config import Precision
from lsag.errors import UnavailableError, UsageError
from lsag.machine import multiplies_bf16

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The type of matrix products in each precision. tf32 is fp32 that NVIDIA's tensor cores round to 10 bits first."""


def choose_device(name: str = "auto", *, keep_memory: bool = True) -> torch.device:
    """`auto` takes CUDA, then Apple's MPS, then the CPU; any other name is that device or an UnavailableError.

    On the CPU the process then keeps the memory that tensors free, unless `keep_memory` is off.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    kind, _, index = name.partition(":")
    missing = bool(index) and not (kind == "cuda" and index.isdigit() and int(index) < torch.cuda.device_count())
    if missing or not available.get(kind, False):
        choices = ", ".join(kind for kind, there in available.items() if there)
        raise UnavailableError(f"device '{name}' is not available here", f"use one of: {choices}")
    device = torch.device(name)
    if device.type == "cpu" and keep_memory:
        _keep_freed_memory()
    return device


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Inside, if it is `wanted`, torch allows only operations that give the same bits every time."""
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    enabled, benchmark = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    memory.fill_uninitialized_memory = False  # nothing here reads it, and filling costs launches
    try:
        yield
    finally:
        memory.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark


def choose_precision(device: torch.device, precision: Precision = "auto", *, timm: bool = False) -> Precision:
    """`auto` is bf16 on GPUs and processors that multiply it natively, fp16 on other CUDA GPUs, and elsewhere fp32.

    It is fp32 on a CPU for a network of timm's that is trained (`timm`): with AMX, oneDNN's gradient of a 3 x 3
    convolution with stride 2 in bf16 is undefined on maps of one pixel (torch 2.11 and 2.15). UsageError for a
    precision that is unknown, or that the device does not have.
    """
    if precision == "auto":
        if device.type != "cuda":
            return "bf16" if device.type == "cpu" and not timm and multiplies_bf16() else "fp32"
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if precision not in DTYPES:
        raise UsageError(f"unknown precision '{precision}'", f"use one of: auto, {', '.join(DTYPES)}")
    if precision == "tf32" and device.type != "cuda":
        raise UsageError(f"tf32 is a precision of NVIDIA GPUs, and this is {device}", "use fp32 or bf16")
    return precision


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Matrix products in `dtype`; with fp32 it does nothing."""
    return torch.autocast(device.type, dtype, enabled=dtype is not torch.float32)


@contextmanager
def tf32(wanted: bool) -> Iterator[None]:
    """Inside, CUDA's products and convolutions of fp32 are TF32, or, unless it is `wanted`, full fp32.

    torch's own default is full fp32 for products, and TF32 for convolutions.
    """
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = wanted
    try:
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


def peak_memory(device: torch.device) -> int:
    """Peak memory of this process in bytes: on a GPU of its tensors there, elsewhere of all that is resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _keep_freed_memory() -> None:
    """Keep glibc from returning large freed tensors to the system at once.

    Every step allocates the same activations again, and each of their pages would fault again. What that costs is
    in docs/benchmarks.md.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            m_trim_threshold, m_mmap_max = -1, -4
            mallopt(m_mmap_max, 0)
            mallopt(m_trim_threshold, 2**31 - 1)
