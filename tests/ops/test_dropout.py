"""Dropout whose elements are a function of a seed: the kernel against the reference, and whether they look drawn."""

import numpy
import pytest
import torch
from kernels import assert_kernel_equals_reference, needs_triton, random
from tiny_models import llama

from lumen import ops
from lumen.adapter import attach_lora
from lumen.checkpoint import load_model
from lumen.config import Lora
from lumen.nn.recompute import Keeping, recomputed
from lumen.ops.dropout import draw_seeds, kept, thin_rows, thinned, thinned_reference


def drawn(number: int, count: int = 1) -> torch.Tensor:
    torch.manual_seed(number)
    return draw_seeds(count, torch.device("cpu"))


def mixed(x: int) -> int:
    """The hash as it is published, for unsigned words of C."""
    with numpy.errstate(over="ignore"):
        x = numpy.uint32(x)
        x ^= x >> numpy.uint32(16)
        x *= numpy.uint32(0x21F0AAAD)
        x ^= x >> numpy.uint32(15)
        x *= numpy.uint32(0x735A2D97)
        return int(x ^ (x >> numpy.uint32(15)))


def test_elements_are_those_of_the_equation():
    seed = 0x7FEDCBA987654321
    found = kept(5, 7, 0.4, torch.tensor(seed))
    for row in range(5):
        key = mixed(mixed(row ^ (seed & 0xFFFFFFFF)) ^ (seed >> 32))
        for column in range(7):
            bits = mixed(key ^ (column * 2654435761 & 0xFFFFFFFF))
            assert found[row, column].item() == (bits / 2**32 >= 0.4)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.99])
def test_kernel_gives_the_bits_of_the_reference(dtype, p):
    for rows, width in ((1, 1), (13, 37), (9, 600)):
        x = random(rows, width + 3, learns=False).to(dtype)[:, :width]
        seed = draw_seeds(1, x.device)[0]
        assert torch.equal(thin_rows(x, p, seed), thinned_reference(x, p, seed))
        start = random(rows, width, seed=1, learns=False)
        wanted = start + thinned_reference(x.float(), p, seed)
        assert torch.equal(thin_rows(x.float(), p, seed, add_to=start.clone()), wanted)


@needs_triton
def test_values_and_gradient_match_the_reference():
    x, seed = random(3, 5, 70), drawn(0)[0]
    assert_kernel_equals_reference(lambda: thinned(x * 1, 0.3, seed), [x], tolerance=0.0)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5])
def test_the_share_that_is_dropped_is_p_everywhere(p):
    """Within 5 standard deviations of a drawn mask's, in the whole, in every row and in every column."""
    rows, width = 700, 900
    keep = kept(rows, width, p, drawn(1)[0]).double()
    for share, count in ((keep.mean(), rows * width), (keep.mean(0), rows), (keep.mean(1), width)):
        assert (share - (1 - p)).abs().max() <= 5 * (p * (1 - p) / count) ** 0.5


def test_rows_columns_and_seeds_are_not_alike():
    """Correlations of what is kept: of neighbours at many distances, and of masks of seeds that lie close together."""
    size = 600
    one = kept(size, size, 0.5, torch.tensor(12345)).double() * 2 - 1
    for distance in (1, 2, 3, 16, 64, 256):
        for pair in (one[distance:] * one[:-distance], one[:, distance:] * one[:, :-distance]):
            assert abs(pair.mean()) <= 5 / pair.numel() ** 0.5, distance
    for seed in (12344, 12346, 12345 + 2**32, *drawn(2, 3).tolist()):
        other = kept(size, size, 0.5, torch.tensor(seed)).double() * 2 - 1
        assert abs((one * other).mean()) <= 5 / size, seed


def test_a_seed_is_another_at_every_draw_and_the_same_after_the_same_state():
    first, second = drawn(3, 4), draw_seeds(4, torch.device("cpu"))
    assert len({*first.tolist(), *second.tolist()}) == 8
    assert torch.equal(first, drawn(3, 4))
    assert first.dtype == torch.int64 and (first >= 0).all()


@pytest.mark.parametrize("restored", [True, False], ids=["generator restored", "generator left alone"])
def test_what_is_computed_again_drops_the_same_elements(restored):
    """Without the generator's state too, for that cannot be put back while a CUDA graph is recorded."""
    x = random(40, 30)

    def part(x):
        for _ in range(2):
            x = thinned(x, 0.2, draw_seeds(1, x.device)[0]) ** 2
        return x

    torch.manual_seed(4)
    (wanted,) = torch.autograd.grad(part(x).sum(), x)
    torch.manual_seed(4)
    y = recomputed(part, x, random=restored)
    torch.manual_seed(5)  # what is drawn meanwhile does not matter
    (found,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(found, wanted)


def test_mean_of_many_masks_is_the_input():
    x = random(4, 8, learns=False)
    mean = torch.stack([thinned(x, 0.25, seed) for seed in drawn(6, 4000)]).mean(0)
    assert ((mean - x) / x).abs().max() <= 5 * (0.25 / 0.75 / 4000) ** 0.5


def test_nothing_dropped_is_the_input_itself():
    x = random(3, 4)
    assert thinned(x, 0.0, torch.tensor(1)) is x
    with ops.use("reference"):
        assert torch.equal(thinned(x, 0.0, torch.tensor(1)), x)


@pytest.mark.parametrize("implementation", [pytest.param("triton", marks=needs_triton), "reference"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_model_s_gradients_are_the_same_bits_whatever_its_blocks_compute_again(tmp_path, implementation, dora):
    llama(tmp_path, num_hidden_layers=1)
    model = load_model(tmp_path).train()
    for pair in attach_lora(model, Lora(rank=3, dropout=0.4, dora=dora)).values():
        torch.nn.init.normal_(pair.b, std=0.1)
    tokens = torch.randint(257, (1, 7), generator=torch.Generator().manual_seed(1))
    found = []
    for level, seed in (("all", 0), ("attention", 0), ("input", 0), ("all", 1)):
        model.keeping = (Keeping(level),) * len(model.blocks)
        model.zero_grad()
        torch.manual_seed(seed)
        with ops.use(implementation, "project", "thinned"):
            model(tokens, torch.arange(7)[None]).square().sum().backward()
        found.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert len(found[0]) == 7 * (3 if dora else 2)
    for other in found[1:3]:
        assert all(map(torch.equal, found[0], other))
    assert not any(map(torch.equal, found[0], found[3]))
