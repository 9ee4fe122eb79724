import platform

import pytest
import torch
from torch import nn

import lsag.model.cpu
from lsag import LSAG
from lsag.model.blocks import MLP
from lsag.model.cpu import MLP_ROWS, Linear, attention, linear
from lsag.paper.released import as_released
from tests.conftest import small_config

needs_onednn = pytest.mark.skipif(  # asks the machine, not our module: a renamed operator must be noticed
    not torch.backends.mkldnn.is_available() or platform.machine() not in ("x86_64", "AMD64"), reason="no oneDNN here"
)
INPUTS = {
    "rows": torch.randn(5, 6),
    "one row": torch.randn(1, 6),
    "tokens": torch.randn(2, 3, 6),
    "rows with gaps": torch.randn(2, 3, 4, 6)[:, :, 1],
    "transposed": torch.randn(3, 6, 4).transpose(1, 2),
    "no rows": torch.randn(0, 6),
    "a vector": torch.randn(6),
}


@pytest.fixture(autouse=True)
def everything_through_onednn(monkeypatch):
    """As on a processor that MKL is slow on, whatever this one is."""
    monkeypatch.setattr(lsag.model.cpu, "MKL_IS_SLOW", True)


@pytest.mark.parametrize("x", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("wide", [9, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_products_and_gradients_are_those_of_torch(x, wide, bias):
    weight, offset = torch.randn(wide, 6, requires_grad=True), torch.randn(wide, requires_grad=True) if bias else None
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    leaves = [leaf for leaf in (x, weight, offset) if leaf is not None]
    found, expected = linear(x, weight, offset), nn.functional.linear(x, weight, offset)
    torch.testing.assert_close(found, expected)
    grad = torch.randn(expected.shape[::-1]).permute(*reversed(range(expected.dim())))  # not contiguous either
    for ours, theirs in zip(
        torch.autograd.grad(found, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    with torch.inference_mode():
        torch.testing.assert_close(linear(x, weight, offset), expected)


@pytest.fixture
def calls(monkeypatch):
    """A list that grows with every product through oneDNN."""
    calls = []
    real = lsag.model.cpu._onednn
    monkeypatch.setattr(lsag.model.cpu, "_onednn", lambda *arguments: calls.append(1) or real(*arguments))
    return calls


@needs_onednn
def test_only_inference_on_a_cpu_goes_through_onednn(calls):
    layer, x = Linear(4, 4), torch.randn(2, 4)
    layer(x)
    with torch.inference_mode():
        layer.double()(x.double())
        layer.float()
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype is torch.bfloat16
        assert layer.to("meta")(x.to("meta")).device.type == "meta"
        as_released(LSAG(small_config())).forward(torch.randn(1, 3, 12, 12))
        assert not calls
        for dtype in lsag.model.cpu.ONEDNN_DTYPES:
            expected = nn.functional.linear(x, weight := torch.randn(4, 4))
            found = linear(x.to(dtype), weight.to(dtype))
            assert calls.pop() and found.dtype is dtype
            torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)


def test_bf16_works_where_onednn_has_none(monkeypatch, calls):
    monkeypatch.setattr(lsag.model.cpu, "ONEDNN_DTYPES", {torch.float32})
    layer, x = Linear(4, 4).bfloat16(), torch.randn(2, 4, dtype=torch.bfloat16)
    with torch.inference_mode():
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias)) and not calls


@needs_onednn
@pytest.mark.parametrize("mkl_is_slow", [True, False])
def test_attention_in_fp32_goes_through_onednn_where_mkl_is_slow(monkeypatch, calls, mkl_is_slow):
    monkeypatch.setattr(lsag.model.cpu, "MKL_IS_SLOW", mkl_is_slow)
    query = torch.randn(1, 1, 300, 8)
    attention(query, query, query)
    with torch.inference_mode():
        attention(query.bfloat16(), query.bfloat16(), query.bfloat16())
        attention(query[:, :, :200], query[:, :, :200], query[:, :, :200])
        assert not calls
        attention(query, query, query)
    assert bool(calls) is mkl_is_slow


PROCESSORS = {
    "Zen 5": ("AuthenticAMD", 26, "AVX512", True),
    "Zen 5 without AVX-512": ("AuthenticAMD", 26, "AVX2", False),
    "Zen 4": ("AuthenticAMD", 25, "AVX512", False),
    "another maker": ("GenuineIntel", 26, "AVX512", False),
}


@pytest.mark.parametrize(("vendor", "family", "vectors", "expected"), PROCESSORS.values(), ids=PROCESSORS)
def test_where_mkl_is_slow(monkeypatch, vendor, family, vectors, expected):
    text = f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: 2\n"
    monkeypatch.setattr("pathlib.Path.read_text", lambda path: text)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: vectors)
    assert lsag.model.cpu._mkl_is_slow() is expected


def test_an_unknown_processor_is_left_to_mkl(monkeypatch):
    def read(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr("pathlib.Path.read_text", read)
    assert not lsag.model.cpu._mkl_is_slow()


@pytest.mark.parametrize("queries", [1, 300, 1500])
def test_attention_is_that_of_torch(queries):
    """With gaps between heads in memory, as in the model, and with more queries than one chunk has."""
    query = torch.randn(2, queries, 3, 8).transpose(1, 2).requires_grad_()
    key, value = torch.randn(2, 300, 2, 3, 8, requires_grad=True).permute(2, 0, 3, 1, 4)
    leaves, found = (query, key, value), attention(query, key, value)
    expected = nn.functional.scaled_dot_product_attention(query, key, value)
    with torch.inference_mode():
        torch.testing.assert_close(attention(query, key, value), expected)
    torch.testing.assert_close(found, expected)
    grad = torch.randn(2, queries, 3, 8).transpose(1, 2)
    for ours, theirs in zip(
        torch.autograd.grad(found, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("chunk", [2**22, 1])
def test_gradients_of_attention_in_bf16_are_those_in_fp32(monkeypatch, chunk):
    monkeypatch.setattr(lsag.model.cpu, "ATTENTION_BYTES", chunk)
    query = torch.randn(2, 70, 3, 8).transpose(1, 2).bfloat16().requires_grad_()
    key, value = torch.randn(2, 40, 2, 3, 8, dtype=torch.bfloat16, requires_grad=True).permute(2, 0, 3, 1, 4)
    leaves, grad = (query, key, value), torch.randn(2, 70, 3, 8).transpose(1, 2)
    expected = nn.functional.scaled_dot_product_attention(*(leaf.float() for leaf in leaves))
    found = attention(*leaves)
    ours = torch.autograd.grad(found, leaves, grad.bfloat16())
    for mine, other in zip((found, *ours), (expected, *torch.autograd.grad(expected, leaves, grad)), strict=True):
        assert mine.dtype is torch.bfloat16
        assert (mine - other).norm() / other.norm() < 0.01


def test_attention_in_bf16_keeps_no_weights():
    query, key, value, shapes = *torch.randn(3, 1, 1, 300, 8, dtype=torch.bfloat16, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda saved: shapes.append(saved.shape) or saved, lambda saved: saved
    ):
        attention(query, key, value)
    assert shapes == [(1, 1, 300, 8)] * 3


@pytest.mark.parametrize("x", INPUTS.values(), ids=INPUTS)
def test_the_mlp_is_that_of_torch(monkeypatch, x):
    block = MLP(6, 20)
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    leaves = [x, *block.parameters()]
    found, expected = block(x), nn.Sequential.forward(block, x)
    grad = torch.randn(expected.shape)
    ours, theirs = torch.autograd.grad(found, leaves, grad), torch.autograd.grad(expected, leaves, grad)
    for mine, other in zip([found, *ours], [expected, *theirs], strict=True):
        torch.testing.assert_close(mine, other)
    for rows in (MLP_ROWS, 2, 1):  # all rows at a time, two, one
        monkeypatch.setattr(lsag.model.cpu, "MLP_ROWS", rows)
        with torch.inference_mode():
            torch.testing.assert_close(block(x), expected)


def test_a_frozen_layer_gets_no_gradient():
    layer, x = Linear(4, 3).requires_grad_(False), torch.randn(2, 4, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is None
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(2, 4))
