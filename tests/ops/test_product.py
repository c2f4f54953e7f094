"""Products without a GPU are PyTorch's own, and of the kernels that cuBLASLt offers the wanted one is taken."""

import pytest
import torch

from lumen.errors import KernelError
from lumen.ops import product as module
from lumen.ops.product import SHARES, TILE_176x128, TILE_256x128, _Kernel, add_product, product


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


class Offers:
    """Stands in for cuBLASLt; `answers` are (tile, shares of the sum, state)."""

    def __init__(self, *answers: tuple[int, int, int], status: int = 0):
        self.answers, self.status, self.alive = answers, status, 0

    def __getattr__(self, name):
        def call(made, *_):
            self.alive += name.endswith("Create") - name.endswith("Destroy")
            return self.status

        return call

    def cublasLtMatmulAlgoGetHeuristic(self, *arguments):
        answers, count = arguments[-2:]
        for index, (_, _, state) in enumerate(self.answers):
            answers[index].algorithm.data[0], answers[index].state = index, state
        count._obj.value = len(self.answers)

    def cublasLtMatmulAlgoConfigGetAttribute(self, algorithm, attribute, number, *_):
        number._obj.value = self.answers[algorithm._obj.data[0]][attribute == SHARES]


@pytest.fixture
def kernel(monkeypatch):
    def made(offers: Offers, outputs: int = 8192, turned: bool = True) -> _Kernel:
        monkeypatch.setattr(module, "_library", lambda: offers)
        monkeypatch.setattr(module, "_handle", lambda device: None)
        inputs = 4096
        return _Kernel(
            0, torch.bfloat16, (8192, outputs, inputs), turned, (inputs, inputs if turned else outputs, outputs)
        )

    return made


@pytest.mark.parametrize(
    ("answers", "outputs", "turned", "taken"),
    [
        ([(7, 1, 0), (TILE_256x128, 1, 0), (TILE_176x128, 1, 0)], 8192, True, 2),
        ([(7, 1, 0), (TILE_256x128, 1, 0), (TILE_176x128, 1, 0)], 4096, True, 1),  # not wide
        ([(TILE_176x128, 1, 0), (TILE_256x128, 1, 0)], 8192, False, 1),
        ([(TILE_256x128, 1, 0), (TILE_256x128, 1, 0)], 4096, True, 0),
        ([(TILE_256x128, 3, 0), (TILE_256x128, 1, 15), (TILE_256x128, 1, 0)], 4096, True, 2),  # shares; an error
        ([(7, 1, 0)], 8192, True, None),
        ([], 8192, True, None),
    ],
)
def test_the_first_kernel_with_the_wanted_tiles_is_taken(kernel, answers, outputs, turned, taken):
    offers = Offers(*answers)
    found = kernel(offers, outputs, turned)
    assert (found.algorithm and found.algorithm.data[0]) == taken
    assert offers.alive == 5  # the product, three layouts, the limits
    del found
    assert offers.alive == 0


def test_a_failure_is_told(kernel):
    with pytest.raises(KernelError, match=r"cuBLASLt failed with status 7\. `ops\.use"):
        kernel(Offers(status=7))
