"""Linear layers; on an x86 CPU through oneDNN, which is in torch and which torch's own nn.Linear does not use in fp32.

nn.Linear leaves fp32 products to MKL. On the AMD processor of docs/benchmarks.md oneDNN takes half the time: 200 to 230
GMACs/s against 105. The operator is the one that torch.compile calls on a CPU.
"""

import platform
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_onednn = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")
    else None
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., in), (out, in), (out,) -> (..., out)."""
    if (
        _onednn is None
        or x.device.type != "cpu"
        or not x.dtype == weight.dtype == torch.float32
        or x.dim() < 2
        or not x.numel()
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()  # a compiler and an exporter want to see nn.Linear
        or torch.jit.is_tracing()
    ):
        return nn.functional.linear(x, weight, bias)
    if torch.is_grad_enabled():
        return _Linear.apply(x, weight, bias)
    return _product(x, weight, bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _onednn(x, weight, bias, "none", [], "")  # type: ignore[misc]


class _Linear(torch.autograd.Function):
    """The product with its gradients, each of which is such a product too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = x.contiguous()  # oneDNN is a hundred times slower with rows that stand apart
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        rows, into = x.flatten(0, -2), grad.flatten(0, -2)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _product(grad, weight.T)
        if ctx.needs_input_grad[1]:
            # The same matrix either way; oneDNN is up to half as fast again when the longer side comes last.
            wide = weight.shape[0] > weight.shape[1]
            grad_weight = _product(rows.T, into.T).T if wide else _product(into.T, rows.T)
        if ctx.needs_input_grad[2]:
            grad_bias = into.sum(0)
        return grad_x, grad_weight, grad_bias


class Linear(nn.Linear):
    """nn.Linear, computed by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return linear(x, self.weight, self.bias)
