"""Pages and the binding of a page to config.json: what is read, and what is refused with which words."""

import json

import pytest

from lumen.errors import SpecError
from lumen.model_config import read_config
from lumen.spec import Family, find_family, load_family

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def spec_of(tmp_path, **changes):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | changes))
    return load_family(tmp_path)


@pytest.mark.parametrize(
    ("changes", "page"),
    [
        ({}, "llama2"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "llama2"),
        ({"vocab_size": 128256, "rope_theta": 500000.0}, "llama3"),
        ({"rope_scaling": LLAMA3_SCALING}, "llama3.1"),
        ({"rope_scaling": LLAMA3_SCALING, "vocab_size": 128256}, "llama3.1"),
    ],
)
def test_match_chooses_the_page(tmp_path, changes, page):
    assert spec_of(tmp_path, **changes).name == page


def test_both_spellings_of_config_json_bind_to_the_same_spec(tmp_path):
    classic = spec_of(tmp_path, rope_scaling=LLAMA3_SCALING, rope_theta=5e5, torch_dtype="bfloat16")
    new = {"rope_parameters": LLAMA3_SCALING | {"rope_theta": 5e5}, "dtype": "bfloat16", "rope_theta": None}
    newer = spec_of(tmp_path, **new)
    assert classic.layers == newer.layers
    assert classic.rope.theta == 5e5 and classic.rope.factor == 32.0
    assert classic.config["torch_dtype"] == newer.config["torch_dtype"] == "bfloat16"


def test_what_stands_beside_the_default_rope_type_does_not_count(tmp_path):
    assert spec_of(tmp_path, rope_scaling={"rope_type": "default", "factor": 8.0}).rope.factor == 1.0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"architectures": ["LlamaForCausalLN"]},
            "The nearest known is 'LlamaForCausalLM', whose arithmetic may",
        ),
        ({"architectures": None}, "LlamaForCausalLM"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "found 'dynamic'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; family 'llama2' wants 'silu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3, which does not divide the 4 heads"),
        ({"hidden_size": 66}, "hidden_size 66 is not a multiple of 4 heads"),
        ({"head_dim": 15}, "head_dim is 15"),
        ({"vocab_size": "many"}, "vocab_size wants a positive whole number, found 'many'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers wants a positive whole number, found 0"),
        ({"intermediate_size": None}, "intermediate_size wants a positive whole number, found None"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps wants a number, found 'small'"),
        ({"rope_scaling": LLAMA3_SCALING | {"factor": None}}, "rope.full.factor"),
        ({"rope_scaling": LLAMA3_SCALING | {"low_freq_factor": 9.0}}, "low_freq_factor < high_freq_factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "factor >= 1"),
        ({"rope_scaling": "linear"}, "rope_scaling wants an object"),
        ({"rope_parameters": ["linear"]}, "rope_parameters wants an object"),
    ],
)
def test_a_config_that_the_page_does_not_describe_is_refused_with_file_key_and_value(tmp_path, changes, words):
    with pytest.raises(SpecError) as refused:
        spec_of(tmp_path, **changes)
    assert words in str(refused.value)
    assert "config.json" in str(refused.value)


def test_a_missing_or_broken_config_json_is_refused(tmp_path):
    with pytest.raises(SpecError, match="does not exist"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"hidden_size": 64')
    with pytest.raises(SpecError, match="is not JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(SpecError, match="wanted a JSON object"):
        read_config(tmp_path)


def test_an_unknown_page_names_the_nearest():
    with pytest.raises(SpecError, match=r"Did you mean 'llama3\.1'"):
        Family.load("llama3.11")


def test_the_pages_of_one_architecture_never_tie():
    for changes in ({}, {"vocab_size": 128256}, {"rope_scaling": LLAMA3_SCALING}):
        config = LLAMA | {"rope_scaling": {"rope_type": "default"}} | changes
        assert find_family(config).page.name in Family.names()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_parameters": {"full_attention": 5}}, "rope_parameters.full_attention wants an object, found 5"),
        ({"rope_parameters": {"sliding_attention": [1]}}, "rope_parameters.sliding_attention wants an object"),
        ({"hidden_size": 10**400}, "hidden_size wants a whole number below 2^31"),
        ({"head_dim": 2**40}, "head_dim wants a whole number below 2^31"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps wants a number that fp32 can hold, found nan"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps wants a number that fp32 can hold, found inf"),
    ],
)
def test_what_would_end_in_a_traceback_is_refused(tmp_path, changes, words):
    with pytest.raises(SpecError) as refused:
        spec_of(tmp_path, **changes)
    assert words in str(refused.value) and "config.json" in str(refused.value)
