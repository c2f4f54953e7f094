"""Every page of `model_specs/`, in tiny: its GGUF file in llama.cpp.

The models have matrices two thirds as wide as elsewhere: the formats' own rounding, byte-equal to ggml's, grows with
the width of the weights, and is not what is tested here. `tests/export/test_gguf_export.py` has pretrained ones, too.
"""

import proofs
import pytest
import torch
from llama_cpp import LlamaCpp
from test_families import LENGTH, some_tokens
from tiny_models import WINDOW, byte_level_tokenizer, family, relative_error
from torch import Tensor

from lumen.errors import ExportError
from lumen.export.gguf import write_gguf
from lumen.spec import load_family

F32_BOUND = {"silu": 1e-4, "gelu_tanh": 5e-3}  # absolute; llama.cpp's GELU is a table of f16 numbers
F16_BOUND = 1e-2  # absolute
Q8_0_BOUND = 1e-3  # nats a token
CLEARLY = 0.05  # relative: what a wrong file must at least do to the logits


def both_logits(tiny, exported, shape: str, quant: str) -> tuple[Tensor, Tensor]:
    """(T, V) of llama.cpp and of transformers, for as many tokens as the file promises to be good for."""
    report, made = exported(shape, quant), tiny(shape, narrow=True)
    assert not report.fallbacks
    spec = load_family(made.folder)
    with LlamaCpp(report.path) as loaded, torch.no_grad():
        promised = int(loaded.metadata(f"{spec.gguf.arch}.context_length"))
        # few where the vocabulary is large: llama.cpp's logits come through Python, one by one
        tokens = some_tokens(1, min(promised, LENGTH, 2**20 // spec.vocab))
        return loaded.logits(tokens[0].tolist()), made.theirs(tokens).logits[0]


@proofs.of("f32")
def test_f32_logits_equal_those_of_transformers(tiny, exported, shape):
    found, wanted = both_logits(tiny, exported, shape, "f32")
    assert (found - wanted).abs().max() <= F32_BOUND[load_family(tiny(shape).folder).mlp]


@proofs.of("f16")
def test_f16_logits_are_near_those_of_transformers(tiny, exported, shape):
    found, wanted = both_logits(tiny, exported, shape, "f16")
    assert (found - wanted).abs().max() <= F16_BOUND


@proofs.of("q8_0")
def test_q8_0_says_nearly_the_same(tiny, exported, shape):
    found, wanted = (logits.double().log_softmax(-1) for logits in both_logits(tiny, exported, shape, "q8_0"))
    assert (wanted.exp() * (wanted - found)).sum(-1).mean() <= Q8_0_BOUND


# --- wrong files, and files that cannot be right ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "key"),
    [
        ("mistral v0.2", "llama.rope.freq_base"),
        ("gemma2", "gemma2.attn_logit_softcapping"),
        ("gemma2", "gemma2.final_logit_softcapping"),
        ("gemma2", "gemma2.attention.sliding_window"),
        ("gemma3", "gemma3.attention.sliding_window"),
        ("gemma3 linear", "gemma3.rope.freq_base_swa"),
        ("gemma3 linear", "gemma3.rope.scaling.factor"),
    ],
)
def test_a_gguf_file_without_one_of_its_keys_loads_and_the_logits_give_it_away(tmp_path, shape, key):
    theirs = family(tmp_path, shape)
    byte_level_tokenizer(tmp_path)
    path = tmp_path / "f32.gguf"
    write_gguf(tmp_path, path, "f32")
    data = path.read_bytes()
    assert data.count(key.encode()) == 1
    path.write_bytes(data.replace(key.encode(), key[:-1].encode() + b"_"))  # a key that llama.cpp does not know
    tokens = some_tokens(1, LENGTH)
    with LlamaCpp(path) as loaded, torch.no_grad():
        assert relative_error(loaded.logits(tokens[0].tolist()), theirs(tokens).logits[0]) >= CLEARLY


def test_a_gguf_file_of_mistral_v01_promises_no_more_than_one_window(tmp_path):
    """llama.cpp's arch `llama` has no windows: beyond one its logits are others, so its context ends there."""
    theirs = family(tmp_path, "mistral")
    byte_level_tokenizer(tmp_path)
    write_gguf(tmp_path, tmp_path / "f32.gguf", "f32")
    tokens = some_tokens(1, LENGTH)
    with LlamaCpp(tmp_path / "f32.gguf") as loaded, torch.no_grad():
        assert loaded.metadata("llama.context_length") == str(WINDOW)
        found, wanted = loaded.logits(tokens[0].tolist()), theirs(tokens).logits[0]
    assert relative_error(found[:WINDOW], wanted[:WINDOW]) <= proofs.TOLERANCE
    assert relative_error(found[WINDOW:], wanted[WINDOW:]) >= CLEARLY


@pytest.mark.parametrize(("shape", "depth"), [("gemma2", 46), ("gemma3", 62)])
def test_the_depth_at_which_llama_cpp_scales_by_width_is_exported_only_with_that_scale(tmp_path, shape, depth):
    theirs = family(tmp_path, shape, num_hidden_layers=depth, query_pre_attn_scalar=64 // 4)
    byte_level_tokenizer(tmp_path)
    write_gguf(tmp_path, tmp_path / "f32.gguf", "f32")
    tokens = some_tokens(1, 24)
    with LlamaCpp(tmp_path / "f32.gguf") as loaded, torch.no_grad():
        assert relative_error(loaded.logits(tokens[0].tolist()), theirs(tokens).logits[0]) <= 5e-3
    family(tmp_path, shape, num_hidden_layers=depth)
    with pytest.raises(ExportError, match=f"{shape}: llama.cpp multiplies q·k by 0.25"):
        write_gguf(tmp_path, tmp_path / "f32.gguf", "f32")


def test_a_scale_that_llama_cpp_would_not_use_is_refused(tmp_path):
    family(tmp_path, "gemma2", query_pre_attn_scalar=16)
    byte_level_tokenizer(tmp_path)
    with pytest.raises(ExportError, match=r"multiplies q·k by 0\.204124 in a 'gemma2' model of 3 layers"):
        write_gguf(tmp_path, tmp_path / "f32.gguf", "f32")
