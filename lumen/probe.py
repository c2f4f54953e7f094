"""What a block takes on this device, and what all around the blocks does: found by running a few of them.

    seconds of a pass = Σ over blocks + rest            bytes at its widest = Σ of what blocks keep + rest

A model of a few blocks with random weights makes forward and backward passes over rows of the run's data, as the run
will: with its adapter, in NF4 or not, recorded as a graph or not. The difference between two depths is a block, and
what one of them takes beside its blocks is the rest: embedding, loss, and what a backward pass works in. So whatever
kernels do, or dropout and DoRA keep, is in the figures, and no rate of the device has to be known.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import nn

from lumen.adapter import attach_lora
from lumen.capture import Passes
from lumen.config import RunConfig
from lumen.data.batch import Batch
from lumen.models.decoder import Decoder
from lumen.nn.linear import Linear, round_to_fp8
from lumen.nn.recompute import Keeping
from lumen.objectives.sft import sft_loss
from lumen.spec import LayerSpec, ModelSpec

TIMED = 5  # passes
IN_FLIGHT = 2  # blocks that `nn.recompute.Mover` has on the device after the last that is moved


@dataclass(frozen=True, kw_only=True)
class Share:
    """What a part of a pass takes."""

    seconds: float
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What was found, for each way in which a block keeps."""

    block: dict[Keeping, Share]
    rest: dict[Keeping, Share]
    moved_bytes: int  # that a block which is moved has on its way; 0 where none is
    fixed_bytes: int  # of buffers that stay between passes, as that of unpacked weights

    def seconds(self, keeping: Sequence[Keeping]) -> float:
        """One pass, forward and backward, of blocks that keep so."""
        return sum(self.block[each].seconds for each in keeping) + self.rest[keeping[-1]].seconds

    def peak_bytes(self, keeping: Sequence[Keeping]) -> int:
        """The most that a pass holds, besides weights, gradients and the optimizer's state.

        At the top all blocks hold what they keep; further down fewer do, but a block that keeps less works in more.
        """
        tops = {each: index + 1 for index, each in enumerate(keeping)}  # of each way, how many blocks are below
        peaks = [
            sum(self.block[below].size_bytes for below in keeping[:top]) + self.rest[each].size_bytes
            for each, top in tops.items()
        ]
        if any(each.moved for each in keeping) and not keeping[-1].moved:
            peaks.append(peaks[-1] + IN_FLIGHT * self.moved_bytes)
        return max(peaks) + self.fixed_bytes


def probe(
    spec: ModelSpec, config: RunConfig, batch: Batch, keeping: Sequence[Keeping], moved_bytes: int, *,
    holds: bool, device: torch.device, dtype: torch.dtype,
) -> Probe | None:  # fmt: skip
    """Runs passes over `batch` for each way to keep in `keeping`; None where that cannot be: experts, too few layers,
    or not even so much fits.

    moved_bytes  that a block has on its way, if one is moved
    holds        weights are unpacked for good

    Some seconds on a GPU, and at the first time those in which kernels are compiled. Draws random numbers.
    """
    shares, fixed = ({}, {}), 0
    capture = config.train.graph and config.data.packing and not any(each.moved for each in keeping)
    try:
        for way in dict.fromkeys(keeping):
            found = []
            for depth in (depths := _depths(spec.layers, way)):
                if spec.experts or depth > len(spec.layers):
                    return None
                model = _model(spec, config, depth, device, dtype)
                model.keeping = (way,) * depth
                if holds:
                    model.hold_unpacked()
                share, stays = _pass(model, batch, capture=capture)
                found.append(share)
                fixed = max(fixed, stays)
                del model
            less, more = depths
            block_s = (found[1].seconds - found[0].seconds) / (more - less)
            size = (found[1].size_bytes - found[0].size_bytes) // (more - less)
            shares[0][way] = Share(seconds=block_s, size_bytes=size)
            rest_s, rest = found[0].seconds - less * block_s, found[0].size_bytes - less * size
            shares[1][way] = Share(seconds=rest_s, size_bytes=rest)
    except torch.OutOfMemoryError:
        return None
    moved_bytes *= any(each.moved for each in keeping)
    return Probe(block=shares[0], rest=shares[1], moved_bytes=moved_bytes, fixed_bytes=fixed)


def _depths(layers: Sequence[LayerSpec], way: Keeping) -> tuple[int, int]:
    """Two depths that differ by one period of the layers' kinds; enough blocks that some are moved, where they are."""
    period = next(n for n in range(1, len(layers) + 1) if all(a == b for a, b in zip(layers, layers[n:], strict=False)))
    least = period * -(-3 // period) if way.moved else period
    return least, least + period


def _model(spec: ModelSpec, config: RunConfig, depth: int, device: torch.device, dtype: torch.dtype) -> Decoder:
    """The first `depth` blocks between embedding and head, with random weights, made to learn what the run learns."""
    full = config.train.method == "full"
    with torch.device("meta"):
        model = Decoder(replace(spec, layers=spec.layers[:depth]), dtype)
    for name, parameter in list(model.named_parameters()):
        role, _, kind = name.rpartition(".")
        module = model.get_submodule(role)
        values = torch.ones(parameter.shape, device=device, dtype=torch.float32 if full else dtype)
        if parameter.ndim == 2:
            values.normal_(0, 0.02)
        if config.model.nf4 and isinstance(module, Linear) and role.startswith("blocks."):
            module.quantize(values)
        else:
            setattr(module, kind, nn.Parameter(values, requires_grad=full))
    if config.model.fp8:
        for block in model.blocks:
            attn, mlp = block.attn, block.mlp
            for group in ((attn.q, attn.k, attn.v), (attn.o,), (mlp.gate, mlp.up), (mlp.down,)):
                round_to_fp8(group)
    if not full:
        attach_lora(model, config.lora)
    return model.train()


def _pass(model: Decoder, batch: Batch, *, capture: bool) -> tuple[Share, int]:
    """What one pass takes, and the bytes that have stayed since the first one, gradients left out."""
    device = model.device
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
    before = _allocated(device)
    passes = Passes(model, sft_loss, capture=capture and on_gpu)
    passes.run(batch)
    held = _allocated(device)
    stays = held - before - sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    passes.run(batch)
    peak = torch.cuda.max_memory_allocated(device) - held if on_gpu else 0
    times = [_seconds(passes, batch, device) for _ in range(TIMED + passes.capture)]
    return Share(seconds=median(times[passes.capture :]), size_bytes=peak), max(stays, 0)  # the first one recorded


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _seconds(passes: Passes, batch: Batch, device: torch.device) -> float:
    began_s = time.perf_counter()
    passes.run(batch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began_s
