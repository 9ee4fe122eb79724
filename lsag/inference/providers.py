"""What can be asked of a model, and what onnxruntime needs for it. Nothing here imports torch, which takes seconds."""

import ctypes
import importlib.metadata
import importlib.util
import re
import sys
from pathlib import Path
from typing import Literal

from lsag.config import Precision
from lsag.errors import UnavailableError, UsageError
from lsag.files import read_bytes

Provider = Literal["auto", "cpu", "cuda", "tensorrt"]
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
"""onnxruntime's names of the execution providers."""
Opset = Literal[20, 23]
OPSETS: dict[int, str] = {20: "1.18", 23: "1.23"}
"""The opsets of exported graphs, with the oldest onnxruntime that reads them on a CPU."""

DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino")
"""Packages that install a module named onnxruntime. Two of them in one environment break each other."""

PACKAGES = {"libcurand": "nvidia-curand", "libcudnn": "nvidia-cudnn-cu13", "libnvinfer": "tensorrt-cu13"}
"""The package of a library that onnxruntime's providers need; the other libraries come with torch."""


def check_model(
    path: str | Path, *, device: str = "auto", provider: str | None = None, precision: Precision | None = None
) -> None:
    """Refuse what cannot work before anything slow is imported: see `open_model` for the arguments.

    UsageError for an option of the other kind of file, InputError for a file that cannot be read, UnavailableError for
    a GPU provider without a driver.
    """
    path = Path(path)
    graph = path.suffix == ".onnx"
    if not graph and provider is not None:
        raise UsageError(f"--provider is for .onnx graphs; {path} runs in PyTorch", "use --device")
    if graph and not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise UsageError(f"--device {device} is not for .onnx graphs", "use auto, cpu, cuda or cuda:N")
    if graph and provider is not None and device != "auto":
        on_gpu = provider in ("cuda", "tensorrt")
        if provider == "auto" or on_gpu != device.startswith("cuda"):
            raise UsageError(f"--device {device} contradicts --provider {provider}", "give one of them")
    if graph and precision not in (None, "auto"):
        raise UsageError(
            f"--precision is for checkpoints; {path} has the precision it was exported with",
            "lsag export CKPT --onnx --precision fp16",
        )
    read_bytes(path, what="graph" if graph else "checkpoint", size=0)
    if provider in ("cuda", "tensorrt"):
        check_driver(provider)
    elif graph and device.startswith("cuda"):
        check_driver("cuda")


def check_driver(provider: str) -> None:
    """UnavailableError if there is no NVIDIA driver, which every GPU provider needs."""
    if not has_driver():
        raise UnavailableError(
            f"the provider {provider} needs an NVIDIA driver, and none was found ({describe_installation()})",
            how_to_fix(provider),
        )


def distributions() -> dict[str, str]:
    """Those of DISTRIBUTIONS that are installed, with their versions."""
    found = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def driver_version() -> str | None:
    """The version of the NVIDIA driver; None without a driver."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return "of unknown version" if has_driver() else None  # WSL has only the library
    version = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)
    return version[0] if version else "of unknown version"


def has_driver() -> bool:
    """Whether there is an NVIDIA driver."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


def has_gpu() -> bool:
    """Whether there may be a GPU by NVIDIA: on Linux the PCI bus is looked at, elsewhere it is not known."""
    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    return sys.platform != "linux" or has_driver() or any(path.read_text().strip() == "0x10de" for path in vendors)


def torch_cuda() -> str | None:
    """The CUDA version that torch was built for; None for a build without CUDA."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    version = re.search(r"^cuda\b.*= '([\d.]+)'", (Path(spec.origin).parent / "version.py").read_text(), re.MULTILINE)
    return version[1] if version else None


def onnxruntime_cuda() -> str | None:
    """The CUDA version that onnxruntime was built for; None for a build without CUDA."""
    if not distributions():
        return None
    import onnxruntime

    return getattr(onnxruntime, "cuda_version", None) or None


def missing_library(provider: str) -> str | None:
    """The first shared library that onnxruntime's "cuda" or "tensorrt" needs and does not find; None if all are found.

    Import torch before: libraries that it has loaded are found.
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
    """What torch, onnxruntime, the driver and the installed packages are, in one line."""
    packages = " and ".join(f"{name} {version}" for name, version in distributions().items()) or "no onnxruntime"
    return (
        f"torch: CUDA {torch_cuda() or 'none'}; onnxruntime: CUDA {onnxruntime_cuda() or 'none'}; "
        f"driver: {driver_version() or 'none'}; installed: {packages}"
    )


def how_to_fix(provider: str) -> str:
    """The step that most likely makes a GPU provider load on this machine."""
    if len(distributions()) > 1:
        return f"pip uninstall -y {' '.join(distributions())} && pip install onnxruntime-gpu"
    if not distributions():
        return "pip install onnxruntime-gpu"
    if onnxruntime_cuda() is None:
        return "pip uninstall -y onnxruntime && pip install onnxruntime-gpu"
    if driver_version() is None:
        return "install the NVIDIA driver, or use --provider cpu" if has_gpu() else "use --provider cpu"
    ours, torchs = ((version or "").split(".")[0] for version in (onnxruntime_cuda(), torch_cuda()))
    if ours != torchs:
        return f"install torch and onnxruntime-gpu for the same CUDA ({torchs or 'none'} and {ours} now)"
    if sys.platform == "linux" and (missing := missing_library(provider)):
        package = next((name for part, name in PACKAGES.items() if missing.startswith(part)), None)
        return f"pip install {package}" if package else f"install {missing}"
    return "use --provider cpu"
