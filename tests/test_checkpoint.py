"""A folder becomes a model: what is refused, and what saving gives back."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import llama, relative_error

from lumen.checkpoint import choose_device, choose_dtype, linear_layers, load_model, new_model, save_model
from lumen.errors import CheckpointError, ConfigError
from lumen.ops import dequantize_nf4, quantize_nf4
from lumen.spec import load_family

TOKENS = torch.randint(257, (2, 20), generator=torch.Generator().manual_seed(4))
POSITIONS = torch.arange(20).expand(2, 20)


def change(folder, edit):
    """Rewrites the weights of `folder` after `edit(tensors)`."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def rename(tensors, old, new):
    tensors[new] = tensors.pop(old)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t.pop("model.norm.weight"), "1 of 21 tensors are missing, the first is 'model.norm.weight'"),
        (lambda t: rename(t, "lm_head.weight", "lm_hed.weight"), "Did you mean 'lm_hed.weight'"),
        (lambda t: t.update({"model.extra.weight": torch.ones(2)}), "'model.extra.weight' in model.safetensors"),
        (lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.ones(2)}), "have no place in a 'llama2' model"),
        (lambda t: t.update({"model.norm.weight": torch.ones(63)}), "wants shape (64,), found (63,)"),
        (lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int32)}), "wants floats"),
    ],
)
def test_tensors_that_are_not_those_of_the_config_are_refused(tmp_path, edit, words):
    llama(tmp_path)
    change(tmp_path, edit)
    with pytest.raises(CheckpointError) as refused:
        load_model(tmp_path)
    assert words in str(refused.value)
    assert str(tmp_path) in str(refused.value)


def test_loading_asks_before_each_tensor_whether_to_go_on_and_draws_no_random_number(tmp_path):
    llama(tmp_path)
    state, asked = torch.get_rng_state(), []
    model = load_model(tmp_path, device="cpu", proceed=lambda: asked.append(1))
    assert len(asked) == 1 + sum(len(name.parts) for name in model.spec.tensors())
    assert torch.equal(torch.get_rng_state(), state)

    def stop():
        asked.pop()
        if len(asked) == 10:
            raise InterruptedError("enough")

    with pytest.raises(InterruptedError, match="enough"):
        load_model(tmp_path, device="cpu", proceed=stop)
    assert len(asked) == 10


def test_stored_rotary_frequencies_and_a_tied_head_that_equals_its_embedding_are_no_strangers(tmp_path):
    llama(tmp_path, tie_word_embeddings=True)

    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    change(tmp_path, add)
    assert load_model(tmp_path).head is None
    change(tmp_path, lambda tensors: tensors["lm_head.weight"].add_(1))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        load_model(tmp_path)


def test_a_sharded_checkpoint_equals_the_single_file(tmp_path):
    model = llama(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="50KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = load_model(tmp_path / "one").state_dict(), load_model(tmp_path / "many").state_dict()
    assert all(torch.equal(one[role], many[role]) for role in one)


def test_nf4_packs_exactly_the_linear_layers_of_the_blocks(tmp_path):
    llama(tmp_path)
    dense, packed = load_model(tmp_path), load_model(tmp_path, nf4=True)
    assert {role for role, _ in packed.named_parameters()} == {
        "embed.weight", "norm.weight", "head.weight",
        *(f"blocks.{i}.{norm}.weight" for i in (0, 1) for norm in ("attn_norm", "mlp_norm")),
    }  # fmt: skip
    for role, layer in linear_layers(packed).items():
        exact = linear_layers(dense)[role].weight
        assert torch.equal(dequantize_nf4(layer.nf4), dequantize_nf4(quantize_nf4(exact.data)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_holds_no_number_is_named_when_it_is_packed(tmp_path, value):
    llama(tmp_path).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as refused:
        load_model(tmp_path, nf4=True)
    shape = tuple(tensors["model.layers.1.mlp.up_proj.weight"].shape)
    assert "model.safetensors: 'model.layers.1.mlp.up_proj.weight'" in str(refused.value)
    assert f"found NaN or infinity in {shape}" in str(refused.value)


def test_a_model_with_nf4_layers_computes_with_their_dequantized_weights(tmp_path):
    llama(tmp_path)
    packed = load_model(tmp_path, nf4=True)
    dense = load_model(tmp_path)
    for role, layer in linear_layers(dense).items():
        layer.weight.data = dequantize_nf4(linear_layers(packed)[role].nf4)
    assert relative_error(packed(TOKENS, POSITIONS), dense(TOKENS, POSITIONS)) < 1e-6


def test_half_precision_files_load_in_the_asked_dtype(tmp_path):
    llama(tmp_path).to(torch.float16).save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(TOKENS, POSITIONS).dtype == torch.bfloat16


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_loads_in_transformers_with_equal_logits(tmp_path, tied):
    llama(tmp_path / "config", tie_word_embeddings=tied)
    model = new_model(load_family(tmp_path / "config"), seed=3)
    (tmp_path / "saved").mkdir()
    save_model(model, tmp_path / "saved")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert relative_error(model.logits(model(TOKENS, POSITIONS)), theirs(TOKENS).logits) < 1e-5
    assert json.loads((tmp_path / "saved/config.json").read_text())["rope_scaling"] is None


def test_a_packed_model_is_not_saved_as_if_it_were_dense(tmp_path):
    llama(tmp_path)
    with pytest.raises(CheckpointError, match="merge its adapter"):
        save_model(load_model(tmp_path, nf4=True), tmp_path)


def test_new_models_of_one_seed_are_equal_and_of_two_are_not(tmp_path):
    llama(tmp_path)
    spec = load_family(tmp_path)
    first, again, other = (new_model(spec, seed=seed).embed.weight for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_auto_means_float32_on_the_cpu_and_an_absent_gpu_is_refused():
    assert choose_dtype("auto", torch.device("cpu")) == torch.float32
    with pytest.raises(ConfigError, match="Did you mean 'bfloat16'"):
        choose_dtype("bfloat15", torch.device("cpu"))
    if not torch.cuda.is_available():
        assert choose_device("auto").type == "cpu"
        with pytest.raises(ConfigError, match="finds no GPU"):
            choose_device("cuda")
