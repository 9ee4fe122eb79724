"""Linear layers and attention; on an x86 CPU through oneDNN, which is in torch, but which torch does not use in fp32.

It leaves fp32 products to MKL, which does not use AVX-512 on AMD's processors. From Zen 5 on that is half of what they
can do: there oneDNN takes half the time (191 to 235 GMACs/s against 101 to 109), and has attention and gradients too.
On Zen 4 (107 against 86) inference gains 1 to 9 %, but attention through oneDNN would cost 2 to 10 % of it, and
gradients 3 to 10 % of a training step. The operator is one that torch.compile calls on a CPU.
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


def _mkl_has_half() -> bool:
    """Whether this is a processor of AMD since Zen 5 (family 26) with AVX-512. Where Linux does not say, it is not."""
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


MKL_HAS_HALF = _mkl_has_half()
MLP_ROWS = 2048
"""Tokens whose hidden layer exists at a time; with 682 instead cifar-base's MLP takes a quarter longer."""
ATTENTION_ROWS = 1024
"""Queries whose weights exist at a time."""
ATTENTION_KEYS = 256
"""With fewer keys torch's fused attention is as fast or faster. With 1024 it takes 1.6 times as long, with 3136 1.5.

On Zen 4 it takes 0.9 times as long with either.
"""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., in), (out, in), (out,) -> (..., out)."""
    if not serves(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled():
        return _Linear.apply(x, weight, bias)
    return _product(x, weight, bias)


def mlp(x: Tensor, first: nn.Linear, second: nn.Linear) -> Tensor:
    """Linear, GELU, linear: (..., D) -> (..., D)."""
    if not serves(x, first.weight):
        return second(F.gelu(first(x)))
    inputs = x, first.weight, first.bias, second.weight, second.bias
    return _MLP.apply(*inputs) if torch.is_grad_enabled() else _mlp(*inputs)


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k / sqrt(d)) v for each image and head: (B, H, M, d), (B, H, N, d), (B, H, N, d) -> (B, H, M, d)."""
    if not MKL_HAS_HALF or not serves(query, key) or key.shape[2] < ATTENTION_KEYS:
        return F.scaled_dot_product_attention(query, key, value)
    return _Attention.apply(query, key, value) if torch.is_grad_enabled() else _attention(query, key, value)


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN is to compute a product of the two."""
    return (
        _onednn is not None
        and (MKL_HAS_HALF or not torch.is_grad_enabled())
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


class _MLP(torch.autograd.Function):
    """Keeps its input alone; the hidden layer, the largest tensor of a block, is computed once more in the backward."""

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
        rows = (t.flatten(0, -2).split(MLP_ROWS) for t in (x, grad.contiguous(), grad_x))
        for some, grad_out, place in zip(*rows, strict=True):
            hidden = _product(some, weight1, bias1)
            grad_weight2 += _weight_grad(F.gelu(hidden), grad_out)
            grad_hidden = _product(grad_out, weight2.T)
            torch.ops.aten.gelu_backward(grad_hidden, hidden, grad_input=grad_hidden)
            grad_weight1 += _weight_grad(some, grad_hidden)
            grad_bias1 += grad_hidden.sum(0)
            place.copy_(_product(grad_hidden, weight1.T))
        return grad_x, grad_weight1, grad_bias1, grad_weight2, grad.flatten(0, -2).sum(0)


def _mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    rows = x.flatten(0, -2).split(MLP_ROWS)
    parts = [_product(_product(some, weight1, bias1, "gelu"), weight2, bias2) for some in rows]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).unflatten(0, x.shape[:-1])


class _Attention(torch.autograd.Function):
    """Keeps queries, keys and values; the weights are computed once more in the backward."""

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
        for queries, keys, values, grads, of_queries, of_keys, of_values in _heads(
            query, key, value, grad, grad_query, grad_key, grad_value
        ):
            keys, values = keys.contiguous(), values.contiguous()
            for some, grad_out, place in zip(
                *(t.split(ATTENTION_ROWS) for t in (queries, grads, of_queries)), strict=True
            ):
                some, grad_out = some * scale, grad_out.contiguous()
                weights = _product(some, keys)
                torch.softmax(weights, dim=-1, out=weights)
                of_values += _weight_grad(grad_out, weights)
                grad_weights = _product(grad_out, values)
                torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype, grad_input=grad_weights)
                of_keys += _weight_grad(some, grad_weights)
                place.copy_(_product(grad_weights, keys.T).mul_(scale))
        return grad_query, grad_key, grad_value


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scale = query.shape[3] ** -0.5
    out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    for queries, keys, values, result in _heads(query, key, value, out):
        keys, values = keys.contiguous(), values.contiguous()
        for some, place in zip(queries.split(ATTENTION_ROWS), result.split(ATTENTION_ROWS), strict=True):
            weights = _product(some * scale, keys)
            place.copy_(_product(torch.softmax(weights, dim=-1, out=weights), values.T))
    return out


def _heads(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """What belongs to one head of one image, from tensors (B, H, N, d) -> (N, d) of each."""
    return zip(*([head for image in tensor for head in image] for tensor in tensors), strict=True)


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
