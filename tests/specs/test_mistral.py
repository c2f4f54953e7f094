"""What Mistral publishes beside the weights: which page a config.json finds, and files in Mistral's own format."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from test_families import logits_of, some_tokens

from lumen.checkpoint import load_model
from lumen.errors import CheckpointError, SpecError
from lumen.names import checkpoint_tensors
from lumen.spec import Family, load_family
from lumen.text.chat_format import write_jinja
from lumen.text.template import ChatTemplate
from lumen.text.tokenizer import load_tokenizer

BASE = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "hidden_size": 5120, "intermediate_size": 14336, "num_hidden_layers": 40, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 131072, "sliding_window": None}  # fmt: skip
RELEASES = {  # release → what its config.json says beside that, and its page
    "Nemo 2407": ({"rope_theta": 1e6, "max_position_embeddings": 131072}, "mistral-v0.2"),
    "Ministral 8B 2410": (
        {"rope_theta": 1e8, "max_position_embeddings": 32768, "sliding_window": 32768, "hidden_size": 4096},
        "mistral",
    ),
    "Small 2501": ({"rope_theta": 1e8, "max_position_embeddings": 32768}, "mistral-small"),
    "Devstral Small 2505": ({"rope_theta": 1e9, "max_position_embeddings": 131072}, "mistral-small"),
    "Magistral Small 2506": ({"rope_theta": 1e9, "max_position_embeddings": 40960}, "mistral-small"),
    "in the newer spelling": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e9}, "max_position_embeddings": 40960},
        "mistral-small",
    ),
}


@pytest.mark.parametrize("release", RELEASES)
def test_a_release_finds_its_page(tmp_path, release):
    own, page = RELEASES[release]
    (tmp_path / "config.json").write_text(json.dumps(BASE | own))
    spec = load_family(tmp_path)
    assert spec.name == page and spec.head_dim == 128
    assert spec.rope.theta == own.get("rope_theta", 1e9) and spec.window == (own.get("sliding_window") or 0)


def test_the_published_config_and_names_of_devstral_are_those_of_the_page(shared_data):
    folder = shared_data / "configs/devstral-small-2507"
    spec = load_family(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors = checkpoint_tensors(spec.tensors())
    assert spec.name == "mistral-small"
    assert {tensor.name for tensor in tensors} == set(index["weight_map"])
    assert sum(torch.Size(tensor.shape).numel() for tensor in tensors) == index["metadata"]["total_parameters"]


@pytest.mark.parametrize("architecture", ["Ministral3ForCausalLM", "MistralForCausalLM"])
def test_ministral_3_is_refused_whatever_it_calls_itself(tmp_path, architecture):
    """Its positions are those of yarn, and its queries grow with theirs: no page says so."""
    config = transformers.Ministral3Config(architectures=[architecture]).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        SpecError, match=r"is 'Ministral3ForCausalLM', which no page|model_type is 'ministral3'; family"
    ):
        load_family(tmp_path)


def test_a_key_beside_yarn_that_no_page_reads_is_refused(tmp_path):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = BASE | RELEASES["Small 2501"][0]
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_scaling": yarn}))
    assert load_family(tmp_path).context_length == 4 * 32768
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_scaling": yarn | {"llama_4_scaling_beta": 0.1}}))
    with pytest.raises(SpecError, match=r"rope_scaling\.llama_4_scaling_beta is 0\.1, and the rope 'yarn' of family"):
        load_family(tmp_path)


@pytest.fixture
def published(tiny, tmp_path) -> Path:
    """A folder as Mistral publishes it: the same weights twice, and the tokenizer in two formats."""
    shutil.copytree(tiny("mistral small").folder, tmp_path, dirs_exist_ok=True)
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "consolidated.safetensors")
    (tmp_path / "params.json").write_text("{}")
    (tmp_path / "tekken.json").write_text("{}")
    return tmp_path


def test_files_in_mistrals_own_format_stand_aside(tiny, published):
    tokens = some_tokens(1, 8)
    model = load_model(published)
    assert torch.equal(logits_of(model, tokens), logits_of(load_model(tiny("mistral small").folder), tokens))
    assert load_tokenizer(published).encode("the fox")


def test_a_tokenizer_that_is_there_as_tekken_json_alone_is_refused_by_the_name_of_what_is_wanted(published):
    (published / "tokenizer.json").unlink()
    with pytest.raises(
        CheckpointError,
        match=r"tokenizer\.json or tokenizer\.model was wanted, found neither.* tekken\.json is not read",
    ):
        load_tokenizer(published)


def test_weights_that_are_there_as_consolidated_safetensors_alone_are_refused_by_the_name_of_what_is_wanted(published):
    (published / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_model(published)


def test_the_chat_of_the_small_page_writes_what_the_tekken_template_does(shared_data):
    theirs = (shared_data / "chat_templates/axolotl__mistral_v7_tekken.jinja").read_text("utf-8")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " One?\n"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "Two?"},
    ]
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    wanted = ChatTemplate(theirs, **names).render(messages, add_generation_prompt=True)
    ours = ChatTemplate(write_jinja(Family.load("mistral-small").page.chat), **names)
    assert ours.render(messages, add_generation_prompt=True) == wanted
    assert ours.render(messages[1:2]) == "<s>[INST] One?\n[/INST]"
