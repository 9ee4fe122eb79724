"""What can be asked of a model, and what running it needs for it. Nothing here imports torch, which takes seconds."""

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

from lsag.config import Precision
from lsag.errors import UnavailableError, UsageError
from lsag.files import read_bytes
from lsag.weights import model_file

Provider = Literal["auto", "cpu", "openvino", "cuda", "tensorrt"]
AUTO = ("cuda", "openvino", "cpu")
"""What "auto" tries, in this order."""
PRECISIONS = {"cuda": ("fp32", "tf32"), "openvino": ("fp32", "bf16"), "cpu": ("fp32",), "tensorrt": ("tf32",)}
"""What each provider can compute a graph in that was exported in fp32, its default first; fp16 remains fp16.

onnxruntime cannot turn off TensorRT's TF32.
"""
OLDEST_OPENVINO = [2026, 4]
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

PACKAGES = {"libcurand": "nvidia-curand", "libcudnn": "nvidia-cudnn-cu13", "libnvinfer": "'tensorrt-cu13<11'"}
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
    read_bytes(path if graph else model_file(path), what="graph" if graph else "checkpoint", size=0)
    if graph:
        provider = graph_provider(device, provider)
        # What the file was exported in is not known yet.
        choose_providers(provider, precision, "fp16" if precision == "fp16" else "fp32")
        if provider in ("cuda", "tensorrt"):
            check_driver(provider)


def graph_provider(device: str, provider: str | None) -> str:
    """The provider of a graph: the one that was named, or the one that `device` means."""
    kind = device.partition(":")[0]
    if provider is None and kind == "cpu":
        return "openvino" if openvino_version() else "cpu"
    return provider or kind


def choose_providers(provider: str, precision: str | None, exported: str) -> dict[str, str]:
    """The providers to try in turn, each with what it computes in: `precision`, or None or "auto" for its default.

    `exported` is the precision that the graph was exported in. UsageError if nothing fits.
    """
    if provider not in get_args(Provider):
        raise UsageError(f"unknown provider '{provider}'", f"use one of: {', '.join(get_args(Provider))}")
    offered = {name: choices if exported == "fp32" else (exported,) for name, choices in PRECISIONS.items()}
    if precision not in (None, "auto"):
        offered = {name: (precision,) for name, choices in offered.items() if precision in choices}
    named = [name for name in (AUTO if provider == "auto" else (provider,)) if name in offered]
    if not named:
        other = "fp16" if precision == "fp16" else "fp32"
        raise UsageError(
            f"{f'the provider {provider} does not run' if offered else 'no provider runs'}"
            f" an {exported} graph in {precision}",
            f"use --provider {next(iter(offered))}" if offered else f"lsag export CKPT --onnx --precision {other}",
        )
    if len(named) > 1 and not openvino_version():
        named.remove("openvino")
    return {name: offered[name][0] for name in named}


def openvino_version() -> str | None:
    """The version of OpenVINO; None if it is not installed, or so old that it computes graphs in fp16 wrongly."""
    try:
        found = importlib.metadata.version("openvino")
    except importlib.metadata.PackageNotFoundError:
        return None
    return found if [int(part) for part in found.split(".")[:2]] >= OLDEST_OPENVINO else None


@contextlib.contextmanager
def signal_stack_kept() -> Iterator[None]:
    """Around OpenVINO's compilation: give this thread its signal stack back.

    OpenVINO sets one of its own, which is gone with the compiled model: the next signal would end the process.
    """
    sigaltstack = getattr(ctypes.CDLL(None), "sigaltstack", None) if sys.platform == "linux" else None
    before = ctypes.create_string_buffer(64)  # a stack_t
    if sigaltstack:
        sigaltstack(None, before)
    try:
        yield
    finally:
        if sigaltstack:
            sigaltstack(before, None)


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


def load_libraries(provider: str) -> None:
    """Load what onnxruntime's "cuda" or "tensorrt" needs from the packages installed; import torch before."""
    import onnxruntime

    onnxruntime.preload_dlls()
    if provider == "tensorrt":
        with contextlib.suppress(ImportError, OSError):
            import tensorrt  # noqa: F401


def missing_library(provider: str) -> str | None:
    """The first shared library that onnxruntime's "cuda" or "tensorrt" needs and does not find; None if all are found.

    Import torch before: libraries that it has loaded are found.
    """
    import onnxruntime

    load_libraries(provider)
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
