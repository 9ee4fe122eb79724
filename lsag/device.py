"""The device that a model runs on, and what is set up once for it."""

import ctypes
import sys
from contextlib import AbstractContextManager

import torch

from lsag.errors import UnavailableError

DEVICES = ("auto", "cuda", "mps", "cpu")


def choose_device(name: str = "auto") -> torch.device:
    """`auto` takes CUDA, then Apple's MPS, then the CPU; any other name is that device or an UnavailableError."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    kind, _, index = name.partition(":")
    missing = bool(index) and not (kind == "cuda" and index.isdigit() and int(index) < torch.cuda.device_count())
    if missing or not available.get(kind, False):
        choices = ", ".join(kind for kind, there in available.items() if there)
        raise UnavailableError(f"device '{name}' is not available here", f"use one of: {choices}")
    device = torch.device(name)
    if device.type == "cpu":
        _keep_freed_memory()
    return device


def autocast(device: torch.device) -> AbstractContextManager[None]:
    """bf16 on CUDA, where it is fast and needs no loss scaling; full precision elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def _keep_freed_memory() -> None:
    """Keep glibc from giving large freed tensors back to the system at once.

    Every step allocates the same activations again, and each of their pages would fault anew. What that costs is
    measured in docs/benchmarks.md.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            m_trim_threshold, m_mmap_max = -1, -4
            mallopt(m_mmap_max, 0)
            mallopt(m_trim_threshold, 2**31 - 1)
