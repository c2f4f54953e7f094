"""Checkpoints that transformers and bitsandbytes packed into NF4, and those that lumen packs for them, both ways."""

import json

import bitsandbytes
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import byte_level_tokenizer, family, llama, relative_error

from lumen.adapter import attach_lora, save_adapter
from lumen.checkpoint import linear_layers, load_model, save_model
from lumen.config import Lora
from lumen.errors import CheckpointError
from lumen.export.__main__ import main
from lumen.export.card import model_card
from lumen.export.gguf import write_gguf
from lumen.export.merge import merge
from lumen.export.nf4 import write_nf4
from lumen.formats.gguf import read_gguf
from lumen.ops import dequantize_nf4, quantize_nf4
from lumen.ops.lora import lora_weight
from lumen.prequantized import check_quantization
from lumen.source import find_source

TOKENS = torch.randint(257, (2, 20), generator=torch.Generator().manual_seed(4))
POSITIONS = torch.arange(20).expand(2, 20)
DOWN = "model.layers.1.mlp.down_proj"
STATE = ".weight.quant_state.bitsandbytes__nf4"
SKIPPED = ["lm_head", "model.layers.0.self_attn", DOWN]
KINDS = {  # what differs between the checkpoints that people have
    "double": {},
    "single": {"bnb_4bit_use_double_quant": False},
    "stored as bfloat16": {"bnb_4bit_quant_storage": torch.bfloat16},
    "dynamic": {"llm_int8_skip_modules": SKIPPED},
    "head too": {"llm_int8_skip_modules": []},
}


def logits(model):
    return model.logits(model(TOKENS, POSITIONS))


def theirs(folder, dtype=torch.float32):
    """transformers' model of `folder`, computing in `dtype`.

    In training mode, for in eval mode the CPU code of bitsandbytes multiplies in bf16. It then rounds a weight to its
    stored dtype on the way to `dtype`, which neither lumen nor its other code does; so the stored dtype is set.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").train()
    for module in packed_modules(model).values():
        module.compute_dtype = module.weight.quant_state.dtype = dtype
    return model


def packed_modules(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}


def their_weight(module, dtype):
    module.weight.quant_state.dtype = dtype
    return bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)


def pack(dense, folder, dtype=torch.float32, **settings):
    """Has transformers and bitsandbytes pack the model in `dense` into `folder`, which is returned."""
    usual = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = transformers.BitsAndBytesConfig(**usual | settings)
    model = transformers.AutoModelForCausalLM.from_pretrained(dense, quantization_config=config, dtype=dtype)
    model.save_pretrained(folder)
    byte_level_tokenizer(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _eager():
    with torch.compiler.set_stance("force_eager"):  # else bitsandbytes compiles for each shape, seconds at a time
        yield


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """kind, dtype → a folder that transformers wrote; kept for all tests, which do not change it.

    Widths are multiples of 64: with others the CPU code of bitsandbytes 0.50 does not give back what it packed.
    """
    made = {}

    def make(kind, dtype=torch.float32):
        if (kind, dtype) not in made:
            folder = tmp_path_factory.mktemp("packed")
            llama(folder / "dense", intermediate_size=128, vocab_size=320)
            made[kind, dtype] = pack(folder / "dense", folder / "packed", dtype, **KINDS[kind])
        return made[kind, dtype]

    return make


@pytest.fixture
def double(packed, tmp_path):
    """A copy of the plainest kind, for a test to damage."""
    folder = tmp_path / "double"
    folder.mkdir()
    for file in packed("double").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


# Loading


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*((kind, torch.float32) for kind in KINDS), ("double", torch.bfloat16), ("double", torch.float16)],
)
def test_blocks_are_used_bit_for_bit_and_logits_equal_those_of_bitsandbytes(packed, kind, dtype):
    folder = packed(kind, dtype)
    compute = torch.float32 if dtype == torch.float16 else dtype  # few CPUs multiply float16
    ours, model = load_model(folder, nf4=True, dtype=str(compute).removeprefix("torch.")), theirs(folder, compute)
    modules = {name: module for name, module in packed_modules(model).items() if name != "lm_head"}
    assert len(modules) == (9 if kind == "dynamic" else 14)
    for name, module in modules.items():
        (row,) = ours.spec.names.by_checkpoint(name)
        layer, state = linear_layers(ours)[row.role], module.weight.quant_state
        assert torch.equal(layer.nf4.codes, module.weight.data.view(torch.uint8).flatten())
        assert torch.equal(layer.nf4.absmax, state.absmax)
        assert state.nested == (layer.nf4.offset is not None)
        assert layer.nf4.dtype == dtype
        assert torch.equal(dequantize_nf4(layer.nf4), their_weight(module, dtype))
        state.dtype = compute
    bound = 1e-6 if compute == torch.float32 else 2e-2  # bf16 has 8 bits, and lumen rounds elsewhere in norm and rope
    assert relative_error(logits(ours), model(TOKENS).logits) < bound


def test_what_a_dynamic_checkpoint_leaves_in_16_bits_is_not_packed_and_that_is_said(packed, caplog):
    folder = packed("dynamic", torch.bfloat16)
    layers = linear_layers(load_model(folder, nf4=True))
    dense = {role for role, layer in layers.items() if layer.nf4 is None}
    assert dense == {"blocks.1.mlp.down", *(f"blocks.0.attn.{part}" for part in "qkvo")}
    stored = load_file(folder / "model.safetensors")
    assert torch.equal(layers["blocks.1.mlp.down"].weight, stored[DOWN + ".weight"].float())
    assert (
        "9 weights are NF4 already and used as they are; 5 linear weights of the blocks are stored dense" in caplog.text
    )


def test_without_nf4_the_same_values_are_held_dense(packed):
    folder = packed("double", torch.bfloat16)
    dense, blocks = load_model(folder), load_model(folder, nf4=True)
    assert all(layer.nf4 is None for layer in linear_layers(dense).values())
    assert torch.equal(logits(dense), logits(blocks))


def test_whoever_points_a_verb_at_such_a_folder_gets_its_blocks(packed, tmp_path):
    folder, held = packed("double"), load_model(packed("double"), nf4=True)
    model, _ = find_source(str(folder)).load()
    assert all(layer.nf4 is not None for layer in linear_layers(model).values())
    attach_lora(held, Lora(rank=2))
    save_adapter(held, tmp_path, Lora(rank=2), str(folder))
    model, _ = find_source(str(tmp_path)).load()
    assert all(layer.nf4 is not None for layer in linear_layers(model).values())
    assert not find_source(str(folder.parent / "dense")).nf4


def test_a_table_of_scales_that_differs_in_its_last_bits_is_the_one_that_counts(double):
    tensors = load_file(double / "model.safetensors")
    for name in tensors:
        if name.endswith("nested_quant_map"):
            tensors[name] = tensors[name] * (1 + 2e-7)
    save_file(tensors, double / "model.safetensors", metadata={"format": "pt"})
    layer, module = load_model(double, nf4=True).blocks[1].mlp.down, theirs(double).model.layers[1].mlp.down_proj
    assert layer.nf4.nested_absmax is None
    assert torch.equal(dequantize_nf4(layer.nf4), their_weight(module, torch.float32))


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        ("phi3", {"num_hidden_layers": 2}),  # q k v in one tensor, gate and up in one
        ("qwen2", {"num_hidden_layers": 2}),  # biases stay dense
        ("gemma2", {"num_hidden_layers": 2, "head_dim": 32}),
        ("qwen3 tied", {"num_hidden_layers": 2}),
    ],
)
def test_other_families_equal_transformers_and_bitsandbytes_too(tmp_path, shape, changes):
    family(tmp_path / "dense", shape, intermediate_size=128, **changes)
    byte_level_tokenizer(tmp_path / "dense")
    pack(tmp_path / "dense", tmp_path / "packed")
    model = load_model(tmp_path / "packed", nf4=True)
    assert all(layer.nf4 is not None for layer in linear_layers(model).values())
    assert relative_error(logits(model), theirs(tmp_path / "packed")(TOKENS).logits) < 1e-5
    write_nf4(tmp_path / "packed", tmp_path / "again")
    ours, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("again", "packed"))
    assert ours.keys() == wanted.keys() and all(torch.equal(tensor, wanted[name]) for name, tensor in ours.items())
    write_nf4(tmp_path / "dense", tmp_path / "ours")
    assert relative_error(logits(model), theirs(tmp_path / "ours")(TOKENS).logits) < 1e-5


def test_experts_that_were_packed_one_by_one_are_used_as_they_are(tmp_path):
    """As on the hub; transformers 5 keeps experts in stacks, which bitsandbytes does not pack, so that it is done here
    with bitsandbytes' own functions, and transformers judges the dequantized weights."""
    family(tmp_path, "qwen3-moe", num_hidden_layers=2, head_dim=32, intermediate_size=128)
    tensors, dense = {}, {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        dense[name] = tensors[name] = tensor
        if ".mlp.experts." in name or name.endswith("_proj.weight"):
            codes, state = bitsandbytes.functional.quantize_4bit(tensor, blocksize=64, quant_type="nf4")
            dense[name] = bitsandbytes.functional.dequantize_4bit(codes, state)
            tensors |= {name: codes} | {f"{name}.{key}": part for key, part in state.as_dict(packed=True).items()}
    save_file(dense, tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    save_file({name: part.clone() for name, part in tensors.items()}, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for nf4 in (True, False):
        model = load_model(tmp_path, nf4=nf4)
        assert (model.blocks[0].mlp.experts.up.nf4 is not None) == nf4
        assert relative_error(logits(model), theirs(TOKENS).logits) < 1e-5


# Refusals


@pytest.mark.parametrize(
    ("found", "kind"),
    [
        ({"quant_method": "gptq", "bits": 4}, "GPTQ (4 bits)"),
        ({"quant_method": "awq"}, "AWQ"),
        ({"quant_method": "fp8", "fmt": "e4m3"}, "FP8 (e4m3)"),
        ({"quant_method": "mxfp4"}, "MXFP4"),
        ({"quant_method": "compressed-tensors", "format": "int-quantized"}, "compressed-tensors (int-quantized)"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}, "int8 (bitsandbytes)"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "fp4 (bitsandbytes)"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "fp4 (bitsandbytes)"),
        ({"quant_method": "of next year"}, "of next year"),
        ({"bits": 3}, "an unnamed kind (3 bits)"),
    ],
)
def test_another_quantization_is_refused_by_its_name_with_what_to_load_instead(tmp_path, found, kind):
    llama(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": found}))
    with pytest.raises(CheckpointError) as refused:
        load_model(tmp_path)
    for words in (f"quantized as {kind}.", "in 16 bits instead", "bnb-4bit", str(tmp_path / "config.json")):
        assert words in str(refused.value)


def test_a_config_of_older_writers_that_names_no_method_is_read():
    assert check_quantization({"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}, "here")
    assert not check_quantization({"quantization_config": None}, "here")


def state(**changes):
    """Rewrites the JSON beside one weight."""

    def edit(tensors):
        found = json.loads(bytes(tensors[DOWN + STATE].tolist())) | changes
        tensors[DOWN + STATE] = torch.tensor(list(json.dumps(found).encode()), dtype=torch.uint8)

    return edit


def part(name, change):
    return lambda tensors: tensors.update({f"{DOWN}.weight{name}": change(tensors[f"{DOWN}.weight{name}"])})


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (state(blocksize=128), "blocksize wants 64, found 128"),
        (state(quant_type="fp4"), "quant_type wants 'nf4', found 'fp4'"),
        (state(nested_blocksize=64), "nested_blocksize wants 256, found 64"),
        (state(nested_offset=float("nan")), "nested_offset wants a finite number"),
        (state(shape=[128, 64]), "wants shape (64, 128), found (128, 64)"),
        (state(shape=[]), "shape wants positive sizes"),
        (state(shape="wide"), "shape"),
        (state(tricks=1), "tricks"),
        (part(STATE.removeprefix(".weight"), lambda t: t[:-1]), "wanted JSON"),
        (part("", lambda t: t[:-1]), "wants 4,096 values for the shape beside it, found 4,095"),
        (part(".absmax", lambda t: t[:-1]), "wants 128 values"),
        (part(".absmax", lambda t: t.float()), "wants torch.uint8, found torch.float32"),
        (part(".nested_absmax", lambda t: t * float("inf")), "wants finite scales"),
        (part(".quant_map", lambda t: t.roll(1)), "is not the table of NF4"),
        (part(".quant_map", lambda t: t * (1 + 2e-7)), "is not the table of NF4"),
        (part(".nested_quant_map", lambda t: t * 1.001), "is not the table of NF4"),
        (lambda tensors: tensors.pop(DOWN + STATE), "have no place in a 'llama2' model"),
        (lambda tensors: tensors.pop(f"{DOWN}.weight.absmax"), "there is no tensor"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_refused_with_the_file_and_the_tensor(double, edit, words):
    tensors = load_file(double / "model.safetensors")
    edit(tensors)
    save_file(tensors, double / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as refused:
        load_model(double, nf4=True)
    assert words in str(refused.value) and "down_proj" in str(refused.value) and str(double) in str(refused.value)


def test_a_config_that_says_otherwise_than_the_files_is_refused(double):
    config = json.loads((double / "config.json").read_text())
    del config["quantization_config"]
    (double / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="quantization_config does not announce 4-bit weights, found 14 of them"):
        load_model(double)


# Training beside the blocks, and merging into them


def with_adapter(folder, adapter):
    """A model on 4-bit blocks with an adapter that does something, also saved in the folder `adapter`."""
    model = load_model(folder, nf4=True)
    torch.manual_seed(0)
    for pair in attach_lora(model, Lora(rank=4, alpha=8.0)).values():
        torch.nn.init.normal_(pair.b, 0, 0.05)
    adapter.mkdir()
    save_adapter(model, adapter, Lora(rank=4, alpha=8.0), str(folder))
    return model


@pytest.mark.parametrize("kind", ["double", "single", "dynamic"])
def test_gradients_of_an_adapter_equal_pefts(packed, tmp_path, kind):
    model = with_adapter(packed(kind), tmp_path / "adapter")
    other = peft.PeftModel.from_pretrained(theirs(packed(kind)), tmp_path / "adapter", is_trainable=True)
    loss = torch.nn.functional.cross_entropy(logits(model)[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    loss.backward()
    their_loss = other(TOKENS, labels=TOKENS).loss
    their_loss.backward()
    assert loss.item() == pytest.approx(their_loss.item(), rel=1e-6)
    grads = {name: parameter.grad for name, parameter in other.named_parameters() if parameter.requires_grad}
    compared = 0
    for role, layer in linear_layers(model).items():
        name = model.spec.names.by_role(role).adapter
        for letter, pair in (("A", layer.lora.a), ("B", layer.lora.b)):
            assert relative_error(pair.grad, grads[f"{name}.lora_{letter}.default.weight"]) < 1e-5
            compared += 1
    assert compared == len(grads) == 28


@pytest.mark.parametrize("kind", ["double", "dynamic"])
def test_merging_into_blocks_gives_the_trained_model_and_says_that_there_is_no_original(packed, tmp_path, kind, caplog):
    model = with_adapter(packed(kind), tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged")
    assert "holds no original weights" in caplog.text
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    assert relative_error(logits(model), theirs(tmp_path / "merged").eval()(TOKENS).logits) < 1e-5
    tensors, layer = load_file(tmp_path / "merged/model.safetensors"), linear_layers(model)["blocks.0.mlp.up"]
    wanted = dequantize_nf4(layer.nf4) + lora_weight(layer.lora.a.detach(), layer.lora.b.detach(), layer.lora.scale)
    assert torch.equal(tensors["model.layers.0.mlp.up_proj.weight"], wanted)


def test_a_merged_weight_has_the_dtype_that_it_had_before_it_was_packed(packed, tmp_path):
    merge(packed("double", torch.bfloat16), tmp_path / "dense")
    assert {tensor.dtype for tensor in load_file(tmp_path / "dense/model.safetensors").values()} == {torch.bfloat16}


def test_saving_writes_no_quantization_config_beside_dense_weights(packed, tmp_path):
    save_model(load_model(packed("double")), tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert relative_error(logits(load_model(packed("double"))), theirs(tmp_path)(TOKENS).logits) < 1e-5


def test_a_gguf_holds_the_values_of_the_blocks(packed, tmp_path):
    write_gguf(packed("double"), tmp_path / "model.gguf", "f32", name="model")
    layer = load_model(packed("double"), nf4=True).blocks[1].mlp.down
    written = read_gguf(tmp_path / "model.gguf").read_rows("blk.1.ffn_down.weight")
    assert torch.equal(written, dequantize_nf4(layer.nf4))


# Writing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_export_holds_the_tensors_that_bitsandbytes_would_write(packed, tmp_path, dtype):
    folder = packed("double", dtype)
    dense = transformers.LlamaForCausalLM.from_pretrained(folder.parent / "dense", dtype=dtype)
    dense.save_pretrained(tmp_path / "dense")
    byte_level_tokenizer(tmp_path / "dense")
    write_nf4(tmp_path / "dense", tmp_path / "out")
    ours, wanted = (load_file(path / "model.safetensors") for path in (tmp_path / "out", folder))
    assert ours.keys() == wanted.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == wanted[name].dtype and torch.equal(tensor, wanted[name]), name
    loaded = load_model(tmp_path / "dense", nf4=True)
    assert relative_error(logits(loaded), theirs(tmp_path / "out")(TOKENS).logits) < 1e-6


@pytest.mark.parametrize("kind", ["double", "single", "dynamic"])
def test_a_base_that_comes_in_nf4_keeps_every_bit(packed, tmp_path, kind):
    write_nf4(packed(kind, torch.bfloat16), tmp_path / "out")
    ours, wanted = (load_file(path / "model.safetensors") for path in (tmp_path / "out", packed(kind, torch.bfloat16)))
    assert ours.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in ours.items())
    assert (
        relative_error(theirs(tmp_path / "out")(TOKENS).logits, theirs(packed(kind, torch.bfloat16))(TOKENS).logits)
        == 0
    )


def test_an_adapter_is_merged_and_packed_and_what_it_does_not_touch_keeps_its_blocks(packed, tmp_path):
    model = load_model(packed("dynamic"), nf4=True)
    lora = Lora(rank=4, alpha=8.0, targets=("attn.q", "mlp.down"))
    torch.manual_seed(0)
    for pair in attach_lora(model, lora).values():
        torch.nn.init.normal_(pair.b, 0, 0.05)
    (tmp_path / "adapter").mkdir()
    save_adapter(model, tmp_path / "adapter", lora, str(packed("dynamic")))
    write_nf4(tmp_path / "adapter", tmp_path / "out")
    out = load_model(tmp_path / "out", nf4=True)
    merge(tmp_path / "adapter", tmp_path / "merged")
    merged = linear_layers(load_model(tmp_path / "merged"))
    for role, layer in linear_layers(out).items():
        before = linear_layers(model)[role]
        assert (layer.nf4 is None) == (before.nf4 is None)
        if layer.nf4 is None:
            assert torch.equal(layer.weight, merged[role].weight)
        elif before.lora is None:
            assert all(torch.equal(tensor, before.nf4.tensors[key]) for key, tensor in layer.nf4.tensors.items())
        else:
            assert torch.equal(dequantize_nf4(layer.nf4), dequantize_nf4(quantize_nf4(merged[role].weight)))
    assert relative_error(logits(out), theirs(tmp_path / "out")(TOKENS).logits) < 1e-6
    assert not list(tmp_path.glob(".merge-*"))


@pytest.mark.parametrize("shape", ["qwen2-moe", "mixtral"])
def test_experts_and_routers_leave_as_they_are_stored(tmp_path, shape, caplog):
    changes = {"num_hidden_layers": 2, "intermediate_size": 128}
    family(tmp_path / "dense", shape, **changes | ({"shared_expert_intermediate_size": 128} if "2" in shape else {}))
    byte_level_tokenizer(tmp_path / "dense")
    write_nf4(tmp_path / "dense", tmp_path / "out")
    ours, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "dense"))
    experts = [name for name in wanted if ".experts." in name]
    assert experts and all(torch.equal(ours[name], wanted[name]) for name in experts)
    model = load_model(tmp_path / "out", nf4=True)
    assert f"{len(experts)} linear weights of the blocks are stored dense" in caplog.text
    assert relative_error(logits(model), theirs(tmp_path / "out")(TOKENS).logits) < 1e-5


def test_the_verb_writes_nf4(packed, tmp_path, capsys):
    folder = packed("double").parent / "dense"
    byte_level_tokenizer(folder)
    assert main([str(folder), str(tmp_path / "out"), "--as", "nf4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["nf4"] == str(tmp_path / "out")
    ours, wanted = (load_file(path / "model.safetensors") for path in (tmp_path / "out", packed("double")))
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in ours.items())


def test_the_page_of_an_export_in_nf4_says_so(packed):
    card = model_card(find_source(str(packed("double"))), "nf4")
    assert 'library_name: "transformers"' in card and "Weights in 4 bits (NF4, as bitsandbytes lays them out)" in card
