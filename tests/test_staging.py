"""Weights through the staging area: the same values in the same order, no more than allowed at a time."""

import threading
from dataclasses import replace

import pytest
import torch
from tiny_models import family, llama

from lumen import staging
from lumen.checkpoint import load_model
from lumen.errors import CheckpointError
from lumen.ops.nf4 import NF4, quantize_nf4

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(staging, "PIECE_BYTES", 100)
    monkeypatch.setattr(staging, "AHEAD_BYTES", 1000)


def random_tensors():
    """Less than a piece, exactly one, many and an incomplete one, no dimension, no value, rows of a whole, turned."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3,), (25,), (37, 41), (), (0, 4), (1,), (90, 7)]
    made = [torch.randn(shape, generator=generator) for shape in shapes]
    made += [made[2].bfloat16(), made[2].half(), made[2].to(torch.float8_e4m3fn), (made[2] > 0).to(torch.uint8)]
    return [*made, made[2][5:9], made[2].T, torch.nn.Parameter(made[6])]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])])
def test_every_tensor_arrives_as_it_was_and_in_its_order(device):
    sent = random_tensors()
    arrived = list(staging.staged(iter(sent), torch.device(device)))
    assert len(arrived) == len(sent)
    for one, other in zip(arrived, sent, strict=True):
        assert (one.shape, one.dtype, one.device.type) == (other.shape, other.dtype, device)
        assert torch.equal(one.cpu().reshape(-1).view(torch.uint8), other.detach().reshape(-1).view(torch.uint8))
        assert one.data_ptr() != other.data_ptr() or not one.numel()


@pytest.mark.parametrize("plain", [False, True], ids=["quantized scales", "plain scales"])
def test_every_part_of_a_packed_weight_arrives(plain):
    packed = quantize_nf4(torch.randn(70, 90).bfloat16())
    if plain:
        packed = replace(packed, absmax=torch.rand(packed.absmax.shape), nested_absmax=None, offset=None)
    (arrived,) = staging.staged([packed], CPU)
    assert (arrived.shape, arrived.dtype, list(arrived.tensors)) == ((70, 90), torch.bfloat16, list(packed.tensors))
    assert all(torch.equal(tensor, packed.tensors[name]) for name, tensor in arrived.tensors.items())


def test_no_more_is_asked_for_than_may_lie_ahead():
    asked = []

    def weights():
        for index in range(20):
            asked.append(index)
            yield torch.full((100,), float(index))  # 400 bytes: two may lie ahead, the third calls for the first

    for index, weight in enumerate(staging.staged(weights(), CPU)):
        assert weight[0] == index
        assert len(asked) <= index + 3
    assert asked == list(range(20))


def test_on_the_cpu_weights_stay_the_pages_of_the_file():
    sent = [torch.ones(3), quantize_nf4(torch.ones(64))]
    first, second = staging.carry(iter(sent), CPU)
    assert first is sent[0] and second.codes.data_ptr() == sent[1].codes.data_ptr()


def test_what_goes_wrong_while_reading_reaches_the_caller_and_leaves_no_thread():
    def weights():
        yield torch.ones(1000)
        raise CheckpointError("the file ends here")

    threads = threading.active_count()
    arrived = staging.staged(weights(), CPU)
    assert next(arrived).sum() == 1000
    with pytest.raises(CheckpointError, match="ends here"):
        next(arrived)
    abandoned = staging.staged((torch.ones(1000) for _ in range(9)), CPU)
    next(abandoned)
    assert threading.active_count() > threads
    abandoned.close()
    assert threading.active_count() == threads


def test_a_large_tensor_on_its_way_can_be_stopped(monkeypatch):
    monkeypatch.setattr(staging, "PIECE_BYTES", 400)
    pieces = []

    def proceed():
        pieces.append(1)
        if len(pieces) == 3:
            raise RuntimeError("enough")

    before = threading.active_count()
    with pytest.raises(RuntimeError, match="enough"):
        next(staging.staged([torch.ones(1000)], CPU, proceed))
    assert len(pieces) == 3 and threading.active_count() == before


def test_inference_mode_of_the_caller_is_no_obstacle():
    with torch.inference_mode():
        (arrived,) = staging.staged([torch.ones(300)], CPU)
    assert arrived.is_inference() and arrived.sum() == 300


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("shape", ["llama3.1", "phi4", "qwen3-moe"])  # single tensors, fused ones, stacks of experts
def test_a_model_that_came_this_way_is_the_model(monkeypatch, tmp_path, shape, nf4):
    family(tmp_path, shape)
    direct = load_model(tmp_path, dtype="bfloat16", nf4=nf4, device="cpu")
    monkeypatch.setattr("lumen.checkpoint.carry", staging.staged)
    monkeypatch.setattr(staging, "PIECE_BYTES", 3000)
    found = load_model(tmp_path, dtype="bfloat16", nf4=nf4, device="cpu")
    assert_equal(found, direct)


def assert_equal(found, wanted):
    """In every parameter and every code; of scales the mean may be another sum on another device."""
    for (role, one), (_, other) in zip(found.named_modules(), wanted.named_modules(), strict=True):
        for ours, theirs in zip(packed_weights(one), packed_weights(other), strict=True):
            assert torch.equal(ours.codes.cpu(), theirs.codes), role
        for name, parameter in other.named_parameters(recurse=False):
            assert torch.equal(getattr(one, name).cpu(), parameter), role


def packed_weights(module):
    """The NF4 weights that a module holds itself: one, or one for each expert."""
    if (packed := getattr(module, "nf4", None)) is None:
        return []
    return [packed] if isinstance(packed, NF4) else [packed[expert] for expert in range(packed.experts)]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("nf4", [False, True])
def test_a_model_loaded_onto_the_gpu_is_the_model_loaded_onto_the_cpu(tmp_path, nf4):
    llama(tmp_path)
    ours, theirs = (load_model(tmp_path, dtype="float32", nf4=nf4, device=name) for name in ("cuda", "cpu"))
    assert_equal(ours, theirs)
