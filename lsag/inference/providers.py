"""What decides whether onnxruntime finds a GPU. Nothing here imports torch, which takes seconds."""

import ctypes
import importlib.metadata
import importlib.util
import re
import sys
from pathlib import Path

from lsag.errors import UnavailableError

DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino")
"""Packages that bring a module named onnxruntime. Two of them in one environment break each other."""

PACKAGES = {"libcurand": "nvidia-curand", "libcudnn": "nvidia-cudnn-cu13", "libnvinfer": "tensorrt-cu13"}
"""What brings a library that onnxruntime's providers need; the others come with torch."""


def check_driver(provider: str) -> None:
    """UnavailableError if there is no NVIDIA driver, without which no GPU provider loads."""
    if not has_driver():
        raise UnavailableError(
            f"--provider {provider} needs an NVIDIA driver, and there is none ({describe_installation()})",
            how_to_fix(provider),
        )


def distributions() -> dict[str, str]:
    """The installed ones of DISTRIBUTIONS, with their versions."""
    found = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def driver_version() -> str | None:
    """The NVIDIA driver's version, None where there is none."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return "of unknown version" if has_driver() else None  # WSL has the library alone
    version = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)
    return version[0] if version else "of unknown version"


def has_driver() -> bool:
    """Whether there is an NVIDIA driver."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


def torch_cuda() -> str | None:
    """The CUDA version that torch was built for, None for a build without."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    version = re.search(r"^cuda\b.*= '([\d.]+)'", (Path(spec.origin).parent / "version.py").read_text(), re.MULTILINE)
    return version[1] if version else None


def onnxruntime_cuda() -> str | None:
    """The CUDA version that onnxruntime was built for, None for a build without."""
    if not distributions():
        return None
    import onnxruntime

    return getattr(onnxruntime, "cuda_version", None) or None


def missing_library(provider: str) -> str | None:
    """A shared library for want of which onnxruntime's "cuda" or "tensorrt" cannot load; None if all are there.

    torch must have been imported: the libraries that it loads are found.
    """
    import onnxruntime

    onnxruntime.preload_dlls()
    path = Path(onnxruntime.__file__).parent / "capi" / f"libonnxruntime_providers_{provider}.so"
    try:
        ctypes.CDLL(str(path))
    except OSError as error:
        found = re.match(r"(\S+): cannot open shared object file", str(error))
        return found[1] if found else None
    return None


def describe_installation() -> str:
    """All of it in one line."""
    packages = " and ".join(f"{name} {version}" for name, version in distributions().items()) or "no onnxruntime"
    return (
        f"torch: CUDA {torch_cuda() or 'none'}; onnxruntime: CUDA {onnxruntime_cuda() or 'none'}; "
        f"driver: {driver_version() or 'none'}; installed: {packages}"
    )


def how_to_fix(provider: str) -> str:
    """The one line that most likely makes a GPU provider load, by what is wrong here."""
    if len(distributions()) > 1:
        return f"pip uninstall -y {' '.join(distributions())} && pip install onnxruntime-gpu"
    if not distributions():
        return "pip install onnxruntime-gpu"
    if onnxruntime_cuda() is None:
        return "pip uninstall -y onnxruntime && pip install onnxruntime-gpu"
    if driver_version() is None:
        return "install the NVIDIA driver, or use --provider cpu"
    ours, torchs = ((version or "").split(".")[0] for version in (onnxruntime_cuda(), torch_cuda()))
    if ours != torchs:
        return f"install torch and onnxruntime-gpu for the same CUDA ({torchs or 'none'} and {ours} now)"
    if sys.platform == "linux" and (missing := missing_library(provider)):
        package = next((name for part, name in PACKAGES.items() if missing.startswith(part)), None)
        return f"pip install {package}" if package else f"install what brings {missing}"
    return "use --provider cpu"
