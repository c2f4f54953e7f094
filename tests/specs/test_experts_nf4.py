"""Experts in 4 bits: packed each alone, used as a checkpoint brings them, with pairs beside them, and merged."""

import copy
import json
from pathlib import Path

import pytest
import torch
from proofs import TOLERANCE
from safetensors.torch import load_file, save_file
from test_experts_families import SHAPES, adapted
from test_families import LENGTH, logits_of, some_tokens, weights
from tiny_models import family, relative_error
from torch import Tensor

from lumen.adapter import load_adapter, lora_pairs
from lumen.checkpoint import linear_layers, load_model
from lumen.errors import CheckpointError
from lumen.export.merge import merge
from lumen.nn.experts import ExpertLinear
from lumen.ops.nf4 import dequantize_nf4, quantize_nf4
from lumen.prequantized import quantization_config, stored_tensors
from lumen.spec import load_family


@pytest.mark.parametrize("shape", SHAPES)
def test_experts_are_packed_each_alone_and_the_router_not_at_all(tiny, shape):
    """Held against transformers' model with each tensor of the checkpoint replaced by its own NF4 image."""
    folder = tiny(shape).folder
    model, stored = load_model(folder, nf4=True), weights(folder)
    images = dict(stored)
    for name in model.spec.tensors():
        layer = model.get_submodule(name.role.rpartition(".")[0])
        if name.exact:
            assert layer.weight.dtype == torch.float32 and torch.equal(layer.weight, stored[name.checkpoint])
        elif name.role in {f"{role}.weight" for role in linear_layers(model)}:
            for part in name.parts:
                packed = layer.nf4 if part.index is None else layer.nf4[part.index]
                alone = quantize_nf4(stored[part.name])
                assert all(torch.equal(packed.tensors[key], values) for key, values in alone.tensors.items())
                images[part.name] = dequantize_nf4(alone)
    assert sum(not torch.equal(images[name], stored[name]) for name in stored) > 12
    theirs = copy.deepcopy(tiny(shape).theirs)
    theirs.load_state_dict(type(theirs).from_pretrained(None, config=theirs.config, state_dict=images).state_dict())
    tokens = some_tokens(2, 24)
    with torch.no_grad():
        assert relative_error(logits_of(model, tokens), theirs(tokens).logits) <= TOLERANCE


@pytest.mark.parametrize("shape", SHAPES)
def test_a_packed_model_with_pairs_has_the_gradients_of_its_dense_image(tiny, shape, tmp_path):
    folder = tiny(shape).folder
    adapted(folder, tmp_path / "adapter")
    packed, dense = load_model(folder, nf4=True), load_model(folder)
    for role, layer in linear_layers(packed).items():
        stack = [layer.nf4[e] for e in range(layer.experts)] if isinstance(layer, ExpertLinear) else [layer.nf4]
        values = torch.stack([dequantize_nf4(one) for one in stack])
        dense.get_submodule(role).weight.data = values if isinstance(layer, ExpertLinear) else values[0]
    tokens = some_tokens(2, 24)
    for model in (packed, dense):
        load_adapter(model, tmp_path / "adapter")
        logits_of(model, tokens).square().mean().backward()
    for role, pair in lora_pairs(packed).items():
        other = lora_pairs(dense)[role]
        assert relative_error(pair.a.grad, other.a.grad) <= TOLERANCE, role
        assert relative_error(pair.b.grad, other.b.grad) <= TOLERANCE, role


def write_prequantized(folder: Path, dense: set[str] = frozenset()) -> dict[str, Tensor]:
    """Packs the linear weights of a folder's blocks, but for `dense`, as bitsandbytes stores them; what they were."""
    spec, stored = load_family(folder), load_file(folder / "model.safetensors")
    linear = [part.name for name in spec.tensors() if len(name.shape) > 1 and not name.exact for part in name.parts]
    packed = [name for name in linear if "layers." in name and name not in dense]
    tensors = {name: values for name, values in stored.items() if name not in packed}
    for name in packed:
        tensors |= {key: part.clone() for key, part in stored_tensors(name, quantize_nf4(stored[name])).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    own = {"quantization_config": quantization_config([], torch.float32)}
    (folder / "config.json").write_text(json.dumps(config | own))
    return stored


def test_experts_of_a_checkpoint_in_nf4_are_used_as_they_are(tmp_path):
    family(tmp_path, "qwen3-moe")
    stored = write_prequantized(tmp_path)
    packed, dense = load_model(tmp_path, nf4=True), load_model(tmp_path)
    for name in packed.spec.tensors():
        if name.parts[0].index is None:
            continue
        stack = packed.get_submodule(name.role.removesuffix(".weight")).nf4
        for part, values in zip(name.parts, dense.state_dict()[name.role], strict=True):
            alone = quantize_nf4(stored[part.name])
            assert all(torch.equal(stack[part.index].tensors[key], own) for key, own in alone.tensors.items())
            assert torch.equal(values, dequantize_nf4(alone))


def test_a_layer_whose_experts_are_partly_packed_is_refused(tmp_path):
    family(tmp_path, "qwen3-moe")
    write_prequantized(tmp_path, dense={"model.layers.1.mlp.experts.3.up_proj.weight"})
    with pytest.raises(CheckpointError, match="all in 4 bits or all dense"):
        load_model(tmp_path, nf4=True)


def test_merging_into_nf4_packs_every_expert_alone_and_leaves_the_router(tiny, tmp_path):
    folder = tiny("qwen2-moe").folder
    adapted(folder, tmp_path / "adapter")
    trained = load_model(folder, nf4=True)
    load_adapter(trained, tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged", base="nf4")
    tokens = some_tokens(2, LENGTH)
    assert relative_error(logits_of(load_model(tmp_path / "merged"), tokens), logits_of(trained, tokens)) <= TOLERANCE
    before, after = weights(folder), weights(tmp_path / "merged")
    for name in ("mlp.gate", "mlp.shared_expert_gate"):
        assert torch.equal(after[f"model.layers.0.{name}.weight"], before[f"model.layers.0.{name}.weight"])
