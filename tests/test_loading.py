"""What a folder may hold, and what is said where its `config.json` and its tensors disagree."""

import json
import logging

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, family, llama, relative_error

from lumen.checkpoint import choose_dtype, load_model
from lumen.errors import CheckpointError, SpecError
from lumen.mismatch import KEYS
from lumen.ops import dequantize_nf4, quantize_nf4
from lumen.spec import load_family

TOKENS = torch.randint(257, (2, 20), generator=torch.Generator().manual_seed(4))
POSITIONS = torch.arange(20).expand(2, 20)


def logits(model):
    return model.logits(model(TOKENS, POSITIONS)).detach()


def change_tensors(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(folder):
    with pytest.raises((CheckpointError, SpecError)) as refused:
        load_model(folder)
    return str(refused.value)


# Dtypes


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_files_of_every_dtype_hold_the_values_that_transformers_reads(tmp_path, stored):
    llama(tmp_path).to(getattr(torch, stored)).save_pretrained(tmp_path)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    model = load_model(tmp_path)
    assert model.dtype == torch.float32 and {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert relative_error(logits(model), theirs(TOKENS).logits) < 1e-6


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_weights_are_packed_from_the_values_of_the_file(tmp_path, stored):
    llama(tmp_path).to(getattr(torch, stored)).save_pretrained(tmp_path)
    values = load_file(tmp_path / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    packed = load_model(tmp_path, nf4=True, dtype="bfloat16").blocks[1].mlp.up.nf4
    assert torch.equal(dequantize_nf4(packed, torch.float32), dequantize_nf4(quantize_nf4(values), torch.float32))


def test_dtypes_mixed_in_one_folder_are_each_read_as_they_are(tmp_path):
    llama(tmp_path)

    def mix(tensors):
        for index, name in enumerate(sorted(tensors)):
            tensors[name] = tensors[name].to((torch.float32, torch.bfloat16, torch.float16)[index % 3])

    change_tensors(tmp_path, mix)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert relative_error(logits(load_model(tmp_path)), theirs(TOKENS).logits) < 1e-6
    assert {parameter.dtype for parameter in load_model(tmp_path, dtype="float16").parameters()} == {torch.float16}


def test_auto_is_bfloat16_only_on_a_gpu_that_does_not_imitate_it(monkeypatch):
    """A GPU of before 2020 has fast float16 and no bfloat16: auto means float32 there, and float16 is had by name."""
    asked = {}

    def native(including_emulation):
        return asked["native"] or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", native)
    gpu = torch.device("cuda")
    for asked["native"], wanted in ((True, torch.bfloat16), (False, torch.float32)):
        assert choose_dtype("auto", gpu) == wanted
    assert choose_dtype("float16", gpu) == torch.float16
    assert choose_dtype("auto", torch.device("cpu")) == torch.float32


# config.json against the tensors


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"intermediate_size": 128}, "intermediate_size (128 by config.json, 96 here)"),
        ({"vocab_size": 300}, "vocab_size (300 by config.json, 257 here)"),
        ({"head_dim": 8}, "num_attention_heads × head_dim (32 by config.json, 64 here)"),
        ({"num_key_value_heads": 4}, "num_key_value_heads × head_dim (64 by config.json, 32 here)"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3 in config.json, found 2 layers"),
        ({"num_hidden_layers": 1}, "num_hidden_layers is 1 in config.json, found 2 layers"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is true in config.json, found a head that is not"),
    ],
)
def test_a_config_that_disagrees_with_its_tensors_says_where_and_which_key_to_look_at(tmp_path, changes, words):
    llama(tmp_path)
    change_config(tmp_path, **changes)
    said = refusal(tmp_path)
    assert words in said
    assert str(tmp_path) in said


def test_a_message_about_a_shape_names_file_tensor_wish_and_fact(tmp_path):
    llama(tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors.update({"model.layers.1.mlp.up_proj.weight": torch.ones(80, 64)}))
    assert refusal(tmp_path) == (
        f"{tmp_path / 'model.safetensors'}: 'model.layers.1.mlp.up_proj.weight' wants shape (96, 64), found (80, 64). "
        "The key to look at is intermediate_size (96 by config.json, 80 here). Is config.json that of these weights?"
    )


def test_a_missing_head_and_strange_biases_name_their_causes(tmp_path):
    llama(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change_tensors(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    assert "'lm_head.weight'. Should tie_word_embeddings be true" in refusal(tmp_path)
    save_file(tensors | {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}, tmp_path / "model.safetensors")
    assert "Layers with biases are another family's" in refusal(tmp_path)


@pytest.mark.parametrize("shape", FAMILIES)
def test_the_keys_named_for_a_shape_give_that_shape(tmp_path, shape):
    """Every axis of every tensor, multiplied out from config.json."""
    family(tmp_path, shape)
    spec = load_family(tmp_path)
    config = spec.config | {"head_dim": spec.head_dim}
    checked = 0
    for tensor in spec.tensors():
        part = tensor.role.removesuffix(".weight")
        part = part.split(".", 2)[2] if part.startswith("blocks.") else part
        if part not in KEYS:
            continue
        sizes = []
        for keys in KEYS[part]:
            first, *others = (config[key] for key in keys.split(" × "))
            sizes.append(first * (others[0] if others else 1))
        assert tuple(sizes) == tensor.shape, part
        checked += 1
    assert checked >= 10


# Folders


def test_pickles_alone_are_refused_with_the_reason_and_beside_safetensors_they_do_not_count(tmp_path):
    llama(tmp_path)
    for name in ("pytorch_model.bin", "consolidated.00.pth", "model.pt"):
        (tmp_path / name).write_bytes(b"\x80\x04 anything")
    wanted = logits(load_model(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    said = refusal(tmp_path)
    assert "consolidated.00.pth, model.pt, pytorch_model.bin" in said and "A pickle can run any program" in said
    llama(tmp_path)
    assert torch.equal(logits(load_model(tmp_path)), wanted)


def test_an_unknown_architecture_lists_what_is_known_and_names_the_nearest(tmp_path):
    llama(tmp_path)
    change_config(tmp_path, architectures=["Gemma3ForConditionalGenerations"])
    said = refusal(tmp_path)
    assert "The nearest known is 'Gemma3ForConditionalGeneration'" in said
    assert all(known in said for known in ("LlamaForCausalLM", "Qwen3ForCausalLM", "Mistral3ForConditionalGeneration"))


def test_an_ordinary_folder_loads_without_a_word(tmp_path, caplog):
    llama(tmp_path)
    with caplog.at_level(logging.DEBUG, "lumen"):
        load_model(tmp_path, nf4=True)
    assert caplog.messages == []
