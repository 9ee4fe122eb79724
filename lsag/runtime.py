"""Exported graphs in onnxruntime or OpenVINO."""

from lsag.inference.providers import PROVIDERS
from lsag.inference.session import Session

__all__ = ["PROVIDERS", "Session"]
