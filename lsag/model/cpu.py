"""Linear layers, MLP and attention on an x86 CPU, in fp32 and bf16, where torch's own way is not the fastest.

torch leaves fp32 products to MKL, which does not use AVX-512 on AMD's processors, and its attention has a slow backward
in bf16 (docs/benchmarks.md, Where the time goes). The oneDNN operator is the one that torch.compile calls.
"""

import platform
import re
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
ONEDNN_DTYPES = {torch.float32}
"""What oneDNN multiplies here; bf16 takes AVX-512 or AVX-NE-CONVERT."""
if _onednn is not None and getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", bool)():
    ONEDNN_DTYPES.add(torch.bfloat16)


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
"""Whether attention in fp32 goes through oneDNN too."""
MLP_ROWS = 2048
"""Tokens whose hidden layer exists at a time."""
ATTENTION_ROWS = 1024
"""Queries whose attention weights exist at a time, of one head."""
ATTENTION_KEYS = 256
"""With fewer keys torch's fused attention is as fast or faster."""
ATTENTION_BYTES = 2**22
"""Size of the attention weights that exist at a time in the backward."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., in), (out, in), (out,) -> (..., out)."""
    return _product(x, weight, bias) if uses_onednn(x, weight) else F.linear(x, weight, bias)


def mlp(x: Tensor, first: nn.Linear, second: nn.Linear) -> Tensor:
    """Linear, GELU, linear: (..., D) -> (..., D)."""
    if not uses_onednn(x, first.weight):
        return second(F.gelu(first(x)))
    chunks = x.flatten(0, -2).split(MLP_ROWS)
    hidden = (_product(rows, first.weight, first.bias, "gelu") for rows in chunks)
    parts = [_product(rows, second.weight, second.bias) for rows in hidden]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).unflatten(0, x.shape[:-1])


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k / sqrt(d)) v for each image and head: (B, H, M, d), (B, H, N, d), (B, H, N, d) -> (B, H, M, d)."""
    if query.device.type == "cpu" and query.dtype is torch.bfloat16 and torch.is_grad_enabled() and not _traced():
        return _Attention.apply(query, key, value)
    if MKL_IS_SLOW and query.dtype is torch.float32 and key.shape[2] >= ATTENTION_KEYS and uses_onednn(query, key):
        return _attention(query, key, value)
    return F.scaled_dot_product_attention(query, key, value)


def uses_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN computes the product of the two: in inference."""
    return (
        _onednn is not None
        and not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in ONEDNN_DTYPES
        and not torch.is_autocast_enabled("cpu")
        and not _traced()
        and x.dim() > 1
        and x.numel() > 0
    )


def _traced() -> bool:
    """Compilers and exporters need torch's own operators."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """(..., in), (out, in), (out,) -> (..., out)."""
    return _onednn(x, weight, bias, activation, [], "none")  # type: ignore[misc]


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scale = query.shape[3] ** -0.5
    out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    heads = ([head for image in tensor for head in image] for tensor in (query, key, value, out))
    for q, k, v, head_out in zip(*heads, strict=True):
        k, v = k.contiguous(), v.contiguous()
        for q_rows, out_rows in zip(q.split(ATTENTION_ROWS), head_out.split(ATTENTION_ROWS), strict=True):
            weights = _product(q_rows * scale, k)
            out_rows.copy_(_product(torch.softmax(weights, dim=-1, out=weights), v.T))
    return out


class _Attention(torch.autograd.Function):
    """Keeps queries, keys and values; the backward computes the attention weights of a few heads at a time again."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value)
        return F.scaled_dot_product_attention(query, key, value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        query, key, value = ctx.saved_tensors
        scale = query.shape[3] ** -0.5
        grads = tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value))
        num_heads = max(1, ATTENTION_BYTES // (query.shape[2] * key.shape[2] * query.element_size()))
        heads = (t.flatten(0, 1).split(num_heads) for t in (query, key, value, grad, *grads))
        for q, k, v, grad_out, grad_q, grad_k, grad_v in zip(*heads, strict=True):
            q = q * scale
            weights = (q @ k.transpose(1, 2)).softmax(dim=-1)
            torch.bmm(weights.transpose(1, 2), grad_out, out=grad_v)
            grad_weights = grad_out @ v.transpose(1, 2)
            torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype, grad_input=grad_weights)
            torch.bmm(grad_weights, k, out=grad_q).mul_(scale)
            torch.bmm(grad_weights.transpose(1, 2), q, out=grad_k)
        return grads


class Linear(nn.Linear):
    """nn.Linear, computed by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return linear(x, self.weight, self.bias)
