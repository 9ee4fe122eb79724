"""What this machine has. torch is not imported."""

import os
import platform
import resource
from pathlib import Path

from lsag.errors import UnavailableError

MIN_ADDRESS_SPACE = 2**32
"""Bytes of addresses without which torch and what it loads do not start."""


def available_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """The processor's name, such as "AMD EPYC 9354P 32-Core Processor"."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def multiplies_bf16() -> bool:
    """Whether the processor has instructions for bf16; always False where there is no /proc/cpuinfo, and on ARM."""
    return any(flag in _cpuinfo("flags").split() for flag in ("avx512_bf16", "amx_bf16"))


def _cpuinfo(key: str) -> str:
    """What Linux says first about a processor under `key`; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def memory() -> int:
    """Bytes of memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_address_space() -> None:
    """UnavailableError if the limit on this process's addresses, `ulimit -v`, leaves too few to import torch."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return
    # Where OpenBLAS finds no memory for a thread, it tries for ever.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if limit < MIN_ADDRESS_SPACE:
        raise UnavailableError(
            f"this shell limits memory to {limit / 2**30:.1f} GiB (ulimit -v), too little to load PyTorch",
            "ulimit -v unlimited",
        )
