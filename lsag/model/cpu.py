"""Linear layers, MLP and attention, on an x86 CPU through oneDNN where it is faster than what torch does in fp32.

torch leaves fp32 products to MKL, which does not use AVX-512 on AMD's processors. From Zen 5 on that is half of what
they can do: there attention and gradients go through oneDNN too, elsewhere only linear layers in inference
(docs/benchmarks.md, Where the speed comes from). The operator is the one that torch.compile calls on a CPU.
"""

import platform
import re
from collections.abc import Iterator
from pathlib import Path
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


def _mkl_is_slow() -> bool:
    """Whether this is an AMD processor since Zen 5 (family 26) with AVX-512; False where Linux does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    family = re.search(r"^cpu family\s*: (\d+)$", text, re.MULTILINE)
    return (
        "AuthenticAMD" in text
        and family is not None
        and int(family[1]) >= 26
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
    )


MKL_IS_SLOW = _mkl_is_slow()
"""Whether attention and gradients go through oneDNN too."""
MLP_ROWS = 2048
"""Tokens whose hidden layer exists at a time."""
ATTENTION_ROWS = 1024
"""Queries whose attention weights exist at a time."""
ATTENTION_KEYS = 256
"""With fewer keys torch's fused attention is as fast or faster."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., in), (out, in), (out,) -> (..., out)."""
    if not uses_onednn(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled():
        return _Linear.apply(x, weight, bias)
    return _product(x, weight, bias)


def mlp(x: Tensor, first: nn.Linear, second: nn.Linear) -> Tensor:
    """Linear, GELU, linear: (..., D) -> (..., D)."""
    if not uses_onednn(x, first.weight):
        return second(F.gelu(first(x)))
    inputs = x, first.weight, first.bias, second.weight, second.bias
    return _MLP.apply(*inputs) if torch.is_grad_enabled() else _mlp(*inputs)


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k / sqrt(d)) v for each image and head: (B, H, M, d), (B, H, N, d), (B, H, N, d) -> (B, H, M, d)."""
    if not MKL_IS_SLOW or not uses_onednn(query, key) or key.shape[2] < ATTENTION_KEYS:
        return F.scaled_dot_product_attention(query, key, value)
    return _Attention.apply(query, key, value) if torch.is_grad_enabled() else _attention(query, key, value)


def uses_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN computes the product of the two."""
    return (
        _onednn is not None
        and (MKL_IS_SLOW or not torch.is_grad_enabled())
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        # Compilers and exporters need torch's own operators.
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and x.dim() > 1
        and x.numel() > 0
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """(..., in), (out, in), (out,) -> (..., out)."""
    return _onednn(x, weight, bias, activation, [], "none")  # type: ignore[misc]


class _Linear(torch.autograd.Function):
    """The product and its gradients, which are such products too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = x.contiguous()  # with gaps between rows oneDNN is many times slower in the backward
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            _product(grad, weight.T) if needs_x else None,
            _weight_grad(x, grad) if needs_weight else None,
            grad.flatten(0, -2).sum(0) if needs_bias else None,
        )


class _MLP(torch.autograd.Function):
    """Keeps only its input; the hidden layer, the largest tensor of a block, is recomputed in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight1, bias1, weight2)
        return _mlp(x, weight1, bias1, weight2, bias2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, weight1, bias1, weight2 = ctx.saved_tensors
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        grad_weight1, grad_bias1, grad_weight2 = (torch.zeros_like(t) for t in (weight1, bias1, weight2))
        chunks = (t.flatten(0, -2).split(MLP_ROWS) for t in (x, grad.contiguous(), grad_x))
        for x_rows, grad_rows, grad_x_rows in zip(*chunks, strict=True):
            hidden = _product(x_rows, weight1, bias1)
            grad_weight2 += _weight_grad(F.gelu(hidden), grad_rows)
            grad_hidden = _product(grad_rows, weight2.T)
            torch.ops.aten.gelu_backward(grad_hidden, hidden, grad_input=grad_hidden)
            grad_weight1 += _weight_grad(x_rows, grad_hidden)
            grad_bias1 += grad_hidden.sum(0)
            grad_x_rows.copy_(_product(grad_hidden, weight1.T))
        return grad_x, grad_weight1, grad_bias1, grad_weight2, grad.flatten(0, -2).sum(0)


def _mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    chunks = x.flatten(0, -2).split(MLP_ROWS)
    parts = [_product(_product(rows, weight1, bias1, "gelu"), weight2, bias2) for rows in chunks]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).unflatten(0, x.shape[:-1])


class _Attention(torch.autograd.Function):
    """Keeps queries, keys and values; the attention weights are recomputed in the backward."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value)
        return _attention(query, key, value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        query, key, value = ctx.saved_tensors
        scale = query.shape[3] ** -0.5
        grad_query, grad_key, grad_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for q, k, v, grad_out, grad_q, grad_k, grad_v in _heads(
            query, key, value, grad, grad_query, grad_key, grad_value
        ):
            k, v = k.contiguous(), v.contiguous()
            chunks = (t.split(ATTENTION_ROWS) for t in (q, grad_out, grad_q))
            for q_rows, grad_rows, grad_q_rows in zip(*chunks, strict=True):
                q_rows, grad_rows = q_rows * scale, grad_rows.contiguous()
                weights = _product(q_rows, k)
                torch.softmax(weights, dim=-1, out=weights)
                grad_v += _weight_grad(grad_rows, weights)
                grad_weights = _product(grad_rows, v)
                torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype, grad_input=grad_weights)
                grad_k += _weight_grad(q_rows, grad_weights)
                grad_q_rows.copy_(_product(grad_weights, k.T).mul_(scale))
        return grad_query, grad_key, grad_value


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scale = query.shape[3] ** -0.5
    out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    for q, k, v, head_out in _heads(query, key, value, out):
        k, v = k.contiguous(), v.contiguous()
        for q_rows, out_rows in zip(q.split(ATTENTION_ROWS), head_out.split(ATTENTION_ROWS), strict=True):
            weights = _product(q_rows * scale, k)
            out_rows.copy_(_product(torch.softmax(weights, dim=-1, out=weights), v.T))
    return out


def _heads(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors (B, H, N, d) of each head of each image in turn: (N, d) of every one."""
    return zip(*([head for image in tensor for head in image] for tensor in tensors), strict=True)


def _weight_grad(x: Tensor, grad: Tensor) -> Tensor:
    """The gradient of a weight from its input (..., in) and the gradient of its output (..., out) -> (out, in)."""
    x, grad = x.flatten(0, -2), grad.flatten(0, -2)
    # The same matrix either way; oneDNN is faster when the longer side comes last.
    return _product(x.T, grad.T).T if grad.shape[1] > x.shape[1] else _product(grad.T, x.T)


class Linear(nn.Linear):
    """nn.Linear, computed by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return linear(x, self.weight, self.bias)
