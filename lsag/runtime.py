"""Exported graphs in onnxruntime."""

from lsag.inference.session import PROVIDERS, Session

__all__ = ["PROVIDERS", "Session"]
