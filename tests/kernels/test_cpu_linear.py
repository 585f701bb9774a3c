"""Packed linear layers against torch's."""

from __future__ import annotations

import pytest
import torch

from macaw_kernels.cpu.linear import PackedLinear, WeightType


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6, 7, 13, 48, 97, 130])
@pytest.mark.parametrize(("n", "k"), [(1, 2), (16, 64), (37, 30), (200, 96)])
@pytest.mark.parametrize("weight_type", ["float32", "bfloat16"])
def test_equals_torch(weight_type: WeightType, n: int, k: int, rows: int, threads: int) -> None:
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(rows * 1000 + n)
    dtype = torch.float32 if weight_type == "float32" else torch.bfloat16
    weight = torch.randn(n, k, generator=generator).to(dtype)
    bias = torch.randn(n, generator=generator)
    x = torch.randn(rows, k, generator=generator)
    for b in (None, bias):
        expected = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
        torch.testing.assert_close(PackedLinear(weight, b, weight_type)(x).double(), expected, atol=1e-5 * k, rtol=1e-5)


def test_leading_axes_and_half_precision_inputs() -> None:
    weight, x = torch.randn(24, 32), torch.randn(2, 3, 32).bfloat16()
    y = PackedLinear(weight, None, "float32")(x)
    assert y.shape == (2, 3, 24)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, x.float() @ weight.T, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 12, 13, 97, 200])
@pytest.mark.parametrize(("n", "k"), [(1, 2), (37, 30), (200, 96)])
def test_bfloat16_by_bfloat16_is_exact_but_for_the_order_of_sums(n: int, k: int, rows: int) -> None:
    weight, bias, x = torch.randn(n, k).bfloat16(), torch.randn(n), torch.randn(rows, k).bfloat16()
    expected = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(PackedLinear(weight, bias, "bfloat16")(x).double(), expected, atol=1e-6 * k, rtol=1e-5)


def test_float32_weights_packed_as_bfloat16_are_rounded_to_nearest() -> None:
    weight = torch.randn(40, 64)
    eye = torch.eye(64)
    assert torch.equal(PackedLinear(weight, None, "bfloat16")(eye), weight.bfloat16().float().T)


def test_int8_is_within_half_a_step_of_every_weight() -> None:
    weight = torch.randn(40, 64)
    weight[3] = 0
    weight[5, 7] = 100.0
    packed = PackedLinear(weight, None, "int8")
    half_step = weight.abs().amax(dim=1) / 127 / 2
    error = (packed(torch.eye(64)).T - weight).abs().amax(dim=1)
    assert (error <= half_step * 1.001).all()
    assert packed.num_bytes < PackedLinear(weight, None, "bfloat16").num_bytes


def test_what_is_not_taken_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[n, k\] with k even, float32 or bfloat16"):
        PackedLinear(torch.randn(4, 3), None, "float32")
    with pytest.raises(ValueError, match=r"torch.float16; \[n, k\]"):
        PackedLinear(torch.randn(4, 4).half(), None, "bfloat16")
    with pytest.raises(ValueError, match="input has 6 features, the weight 4"):
        PackedLinear(torch.randn(4, 4), None, "float32")(torch.randn(1, 6))


@pytest.mark.parametrize("weight_type", ["float32", "bfloat16", "int8"])
def test_the_default_dtype_has_no_say(weight_type: WeightType) -> None:
    weight, bias, x = torch.randn(40, 16), torch.randn(40), torch.randn(3, 16)
    expected = PackedLinear(weight, bias, weight_type)(x)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = PackedLinear(weight, bias, weight_type)(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
