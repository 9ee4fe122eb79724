"""Linear layers and attention; on an x86 CPU through oneDNN, which is in torch, but which torch does not use in fp32.

It leaves fp32 products to MKL. On the AMD processor of docs/benchmarks.md oneDNN takes half the time: 191 to 235
GMACs/s against 101 to 109. The operator is one that torch.compile calls on a CPU.
"""

import platform
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_onednn = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")
    else None
)


ATTENTION_ROWS = 1024
"""Queries whose weights exist at a time."""
ATTENTION_KEYS = 256
"""With fewer keys torch's fused attention is as fast or faster. With 1024 it takes 1.6 times as long, with 3136 1.5."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., in), (out, in), (out,) -> (..., out)."""
    if not _serves(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled():
        return _Linear.apply(x, weight, bias)
    return _product(x, weight, bias)


def mlp(x: Tensor, first: nn.Linear, second: nn.Linear) -> Tensor:
    """Linear, GELU, linear: (..., D) -> (..., D)."""
    if not _serves(x, first.weight):
        return second(F.gelu(first(x)))
    if torch.is_grad_enabled():
        return _GeluLinear.apply(first(x), second.weight, second.bias)
    return _product(_product(x, first.weight, first.bias, "gelu"), second.weight, second.bias)


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k / sqrt(d)) v for each image and head: (B, H, M, d), (B, H, N, d), (B, H, N, d) -> (B, H, M, d)."""
    if not _serves(query, key) or key.shape[2] < ATTENTION_KEYS or torch.is_grad_enabled():
        return F.scaled_dot_product_attention(query, key, value)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    heads = (tensor.contiguous().flatten(0, 1) for tensor in (query * query.shape[3] ** -0.5, key, value))
    for rows, keys, values, result in zip(*heads, out.flatten(0, 1), strict=True):
        for some, place in zip(rows.split(ATTENTION_ROWS), result.split(ATTENTION_ROWS), strict=True):
            weights = _product(some, keys)
            place.copy_(_product(torch.softmax(weights, dim=-1, out=weights), values.T))
    return out


def _serves(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN is to compute a product of the two."""
    return (
        _onednn is not None
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        # Compilers and exporters want to see torch's own operators.
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and x.dim() > 1
        and x.numel() > 0
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None, then: str = "none") -> Tensor:
    return _onednn(x, weight, bias, then, [], "none")  # type: ignore[misc]


class _Linear(torch.autograd.Function):
    """The product with its gradients, each of which is such a product too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = x.contiguous()  # with rows that stand apart oneDNN is many times slower in the backward
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            _product(grad, weight.T) if of_x else None,
            _weight_grad(x, grad) if of_weight else None,
            grad.flatten(0, -2).sum(0) if of_bias else None,
        )


class _GeluLinear(torch.autograd.Function):
    """The product with GELU(x), which is computed once more in the backward: it is the largest tensor of a block."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(F.gelu(x), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        grad_weight = _weight_grad(F.gelu(x), grad)
        grad_x = _product(grad, weight.T)
        torch.ops.aten.gelu_backward(grad_x, x, grad_input=grad_x)
        return grad_x, grad_weight, grad.flatten(0, -2).sum(0)


def _weight_grad(x: Tensor, grad: Tensor) -> Tensor:
    """The gradient of a weight from its input (..., in) and the gradient of its output (..., out) -> (out, in)."""
    rows, into = x.flatten(0, -2), grad.flatten(0, -2)
    # The same matrix either way; oneDNN is up to half as fast again when the longer side comes last.
    return _product(rows.T, into.T).T if into.shape[1] > rows.shape[1] else _product(into.T, rows.T)


class Linear(nn.Linear):
    """nn.Linear, computed by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return linear(x, self.weight, self.bias)
