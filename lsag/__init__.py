"""LSAG: the transformer of "Locally Shifted Attention With Early Global Integration" (Sheynin et al., 2021)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lsag.config import ModelConfig, Preset
from lsag.presets import load_preset

if TYPE_CHECKING:
    from lsag.checkpoint import load_checkpoint
    from lsag.inference.classifier import open_model as load
    from lsag.model.network import LSAG

__version__ = "0.1.0"
__all__ = ["LSAG", "ModelConfig", "Preset", "load", "load_checkpoint", "load_preset"]

# Loaded on first use: they import torch, which takes seconds.
_LAZY = {
    "LSAG": ("lsag.model.network", "LSAG"),
    "load": ("lsag.inference.classifier", "open_model"),
    "load_checkpoint": ("lsag.checkpoint", "load_checkpoint"),
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        module, attribute = _LAZY[name]
        return getattr(import_module(module), attribute)
    raise AttributeError(f"module 'lsag' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
