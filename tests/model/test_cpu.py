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


@needs_onednn
def test_only_fp32_on_a_cpu_goes_through_onednn(monkeypatch):
    calls = []
    real = lsag.model.cpu._onednn
    monkeypatch.setattr(lsag.model.cpu, "_onednn", lambda *arguments: calls.append(1) or real(*arguments))
    layer, x = Linear(4, 4), torch.randn(2, 4)
    layer(x)
    assert calls.pop() and not calls
    layer.double()(x.double())
    layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16
    assert layer.to("meta")(x.to("meta")).device.type == "meta"
    as_released(LSAG(small_config())).forward(torch.randn(1, 3, 12, 12))
    assert not calls


@needs_onednn
def test_elsewhere_attention_and_gradients_are_left_to_torch(monkeypatch):
    calls = []
    real = lsag.model.cpu._onednn
    monkeypatch.setattr(lsag.model.cpu, "MKL_IS_SLOW", False)
    monkeypatch.setattr(lsag.model.cpu, "_onednn", lambda *arguments: calls.append(1) or real(*arguments))
    block, x = MLP(6, 20), torch.randn(2, 6)
    block(x)
    query = torch.randn(1, 1, 300, 8)
    with torch.inference_mode():
        attention(query, query, query)
        assert not calls
        block(x)
    assert len(calls) == 2


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


@needs_onednn
def test_attention_keeps_no_weights():
    query, key, value, shapes = *torch.randn(3, 1, 1, 300, 8, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda saved: shapes.append(saved.shape) or saved, lambda saved: saved
    ):
        attention(query, key, value)
    assert shapes == [(1, 1, 300, 8)] * 3


@pytest.mark.parametrize("x", INPUTS.values(), ids=INPUTS)
def test_the_mlp_is_that_of_torch(monkeypatch, x):
    """Values, and gradients, for which GELU is recomputed and changed in place."""
    block = MLP(6, 20)
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    leaves = [x, *block.parameters()]
    found, expected = block(x), nn.Sequential.forward(block, x)
    grad = torch.randn(expected.shape)
    theirs = torch.autograd.grad(expected, leaves, grad)
    # Repeatedly from the same saved tensors: all rows at a time, two, one.
    for rows in (MLP_ROWS, MLP_ROWS, 2, 1):
        monkeypatch.setattr(lsag.model.cpu, "MLP_ROWS", rows)
        ours = torch.autograd.grad(found, leaves, grad, retain_graph=True)
        for mine, other in zip([found, *ours], [expected, *theirs], strict=True):
            torch.testing.assert_close(mine, other)
    for rows in (MLP_ROWS, 2, 1):  # all rows at a time, two, one
        monkeypatch.setattr(lsag.model.cpu, "MLP_ROWS", rows)
        with torch.inference_mode():
            torch.testing.assert_close(block(x), expected)


@needs_onednn
def test_the_mlp_keeps_only_its_input():
    block, shapes = MLP(6, 20), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda saved: shapes.append(saved.shape) or saved, lambda saved: saved
    ):
        block(torch.randn(1000, 6))
    assert shapes == [(1000, 6), (20, 6), (20,), (6, 20)]


def test_a_frozen_layer_gets_no_gradient():
    layer, x = Linear(4, 3).requires_grad_(False), torch.randn(2, 4, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is None
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(2, 4))
