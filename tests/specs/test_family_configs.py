"""config.json of every family: spellings that mean the same, and what is refused with which words."""

import json
from pathlib import Path

import pytest
from tiny_models import WINDOW, family

from lumen.errors import SpecError
from lumen.spec import Family, load_family


def rewrite_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def test_both_spellings_of_two_ropes_bind_to_the_same_spec(tmp_path):
    family(tmp_path, "gemma3 linear")
    newer = load_family(tmp_path)
    assert "layer_types" in newer.config
    rewrite_config(
        tmp_path,
        rope_parameters=None,
        layer_types=None,
        rope_theta=1e6,
        rope_local_base_freq=3000.0,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        sliding_window_pattern=6,
    )
    classic = load_family(tmp_path)
    assert classic.layers == newer.layers
    assert [layer.rope.theta for layer in classic.layers] == [3000.0] * 5 + [1e6] + [3000.0]
    assert [layer.rope.factor for layer in classic.layers] == [1.0] * 5 + [8.0] + [1.0]
    assert [layer.window for layer in classic.layers] == [WINDOW] * 5 + [0] + [WINDOW]


def test_the_first_gemma_configs_say_gelu_and_mean_its_tanh_form(tmp_path):
    family(tmp_path, "gemma")
    rewrite_config(tmp_path, hidden_act="gelu", hidden_activation=None)
    assert load_family(tmp_path).mlp == "gelu_tanh"


SLIDING_LINEAR = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
}


@pytest.mark.parametrize(
    ("shape", "changes", "words"),
    [
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window is True; family 'qwen2' wants False"),
        ("qwen2", {"layer_types": ["full_attention"] * 2}, "layer_types wants a list of 3 words"),
        ("qwen2", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, "rope_scaling.rope_type is 'dynamic'"),
        ("qwen3", {"attention_bias": True}, "attention_bias is True"),
        ("mistral", {"sliding_window": 0}, "sliding_window wants a window of at least 1 token, found 0"),
        ("mistral", {"sliding_window": "wide"}, "sliding_window wants a number, found 'wide'"),
        ("gemma", {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
        ("gemma2", {"layer_types": ["full_attention"] * 3}, "layer_types[0] is 'full_attention'"),
        ("gemma3", {"sliding_window_pattern": 5}, "sliding_window_pattern is 5"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ("gemma3", {"rope_parameters": SLIDING_LINEAR}, "rope_parameters.sliding_attention.rope_type is 'linear'"),
    ],
)
def test_a_config_that_the_page_does_not_describe_is_refused(tmp_path, shape, changes, words):
    family(tmp_path, shape)
    rewrite_config(tmp_path, **changes)
    with pytest.raises(SpecError) as refused:
        load_family(tmp_path)
    assert words in str(refused.value)


# --- architectures that no page describes ----------------------------------------------------------------------------

STRANGERS = {  # architecture → the nearest that is known, where one is near
    "Qwen3NextForCausalLM": "Qwen3ForCausalLM",
    "Qwen3_5ForCausalLM": "Qwen3ForCausalLM",
    "Gemma3nForCausalLM": "Gemma3ForCausalLM",
    "Llama4ForCausalLM": "LlamaForCausalLM",
    "MinistralForCausalLM": "MistralForCausalLM",
    "Ministral3ForCausalLM": "MistralForCausalLM",
    "PhiForCausalLM": "Phi3ForCausalLM",
    "mistralforcausallm": "MistralForCausalLM",
    "GptOssForCausalLM": "GemmaForCausalLM",
    "LlamaForSequenceClassification": None,
}


@pytest.mark.parametrize("architecture", STRANGERS)
def test_an_unknown_architecture_is_refused_with_those_that_are_known_and_the_nearest(tmp_path, architecture):
    family(tmp_path, "qwen3")
    rewrite_config(tmp_path, architectures=[architecture])
    with pytest.raises(SpecError) as refused:
        load_family(tmp_path)
    message = str(refused.value)
    assert f"{tmp_path / 'config.json'}: architectures is {architecture!r}, which no page describes." in message
    assert {Family.load(name).page.architecture for name in Family.names()} <= known_in(message)
    if nearest := STRANGERS[architecture]:
        assert f"The nearest known is {nearest!r}, whose arithmetic may differ." in message


def known_in(message: str) -> set[str]:
    return set(message.partition("Known: ")[2].rstrip(".").split(", "))
