"""Products without a GPU are PyTorch's own, whatever the library that PyTorch comes with."""

import pytest
import torch

from lumen.ops.product import add_product, product


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("turned", [False, True])
def test_products_are_those_of_pytorch(dtype, turned):
    x = torch.randn(5, 7).to(dtype)
    w = torch.randn(3, 7).to(dtype).T if turned else torch.randn(7, 3).to(dtype)
    start = torch.randn(5, 3).to(dtype)
    assert product(x, w).equal(x @ w)
    place = start.clone()
    assert add_product(place, x, w) is place
    assert place.equal(torch.addmm(start, x, w))
