"""Every family but the Llamas, in tiny: lumen against transformers and llama.cpp, and what a wrong page would do."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from llama_cpp import LlamaCpp
from tiny_models import CONTEXT, FAMILIES, WINDOW, byte_level_tokenizer, family, relative_error
from torch import Tensor
from torch.nn import functional as F

from lumen.checkpoint import load_model, save_model
from lumen.errors import ExportError, SpecError
from lumen.export.gguf import write_gguf
from lumen.models.decoder import Decoder
from lumen.sampling import generate
from lumen.spec import Family, ModelSpec, load_family

TOLERANCE = 1e-5  # relative, fp32
LENGTH = CONTEXT + 16  # beyond the models' context, and ten windows
GGUF_TOLERANCE = {"silu": 1e-4, "gelu_tanh": 5e-3}  # absolute; llama.cpp's GELU is a table of f16 numbers
CLEARLY = 0.05  # relative: what a wrong switch must at least do to the logits


@pytest.fixture(scope="module", params=FAMILIES)
def made(request, tmp_path_factory) -> tuple[Path, transformers.PreTrainedModel]:
    """The folder of a tiny checkpoint with a tokenizer, and transformers' model of it."""
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "_"))
    model = family(folder, request.param)
    byte_level_tokenizer(folder)
    return folder, model


def some_tokens(rows: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(2, 320, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits_of(model: Decoder, tokens: Tensor) -> Tensor:
    return model.logits(model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens)))


def test_every_page_but_the_llamas_has_a_tiny_model():
    pages = {page for page, _, _ in FAMILIES.values()}
    assert pages == {page for page in Family.names() if Family.load(page).page.architecture != "LlamaForCausalLM"}


# --- transformers ----------------------------------------------------------------------------------------------------


def test_the_page_is_found(made, request):
    folder, _ = made
    shape = request.node.callspec.params["made"]
    assert load_family(folder).name == FAMILIES[shape][0]


def test_logits_and_all_gradients_equal_transformers(made):
    folder, theirs = made
    ours = load_model(folder).requires_grad_(True)
    tokens = some_tokens(2, LENGTH)
    wanted, found = theirs(tokens).logits, logits_of(ours, tokens)
    assert relative_error(found, wanted) <= TOLERANCE
    theirs.zero_grad()
    for logits in (wanted, found):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    their_gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    own = dict(ours.named_parameters())
    names = {name.role: name.checkpoint for name in ours.spec.tensors()}
    assert {names[role] for role in own} == set(their_gradients)
    for role, parameter in own.items():
        assert relative_error(parameter.grad, their_gradients[names[role]]) <= TOLERANCE, role


def test_documents_of_a_packed_row_equal_each_document_alone(made):
    model = load_model(made[0])
    lengths = [5, 23, 1, 20]
    documents = [some_tokens(1, length, seed) for seed, length in enumerate(lengths)]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    document = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    packed = model(torch.cat(documents, dim=1), positions, document).split(lengths, dim=1)
    for alone, together in zip(documents, packed, strict=True):
        assert relative_error(model.logits(together), logits_of(model, alone)) <= TOLERANCE


def test_a_saved_folder_has_the_same_logits_in_transformers(made, tmp_path):
    folder, theirs = made
    save_model(load_model(folder), tmp_path)
    again, report = type(theirs).from_pretrained(
        tmp_path, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())
    tokens = some_tokens(2, LENGTH)
    assert torch.equal(again(tokens).logits, theirs(tokens).logits)


def test_greedy_answers_with_a_cache_equal_those_of_transformers(made):
    folder, theirs = made
    model = load_model(folder)
    prompts = [some_tokens(1, length, length)[0].tolist() for length in (3, 17, 30)]
    answers = generate(model, prompts, max_tokens=24, stop_ids=())
    for prompt, answer in zip(prompts, answers, strict=True):
        options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        wanted = theirs.generate(torch.tensor([prompt]), **options)[0].tolist()
        assert prompt + answer.ids == wanted


# --- llama.cpp -------------------------------------------------------------------------------------------------------


def test_the_gguf_file_has_the_same_logits_in_llama_cpp(made, tmp_path):
    folder, theirs = made
    write_gguf(folder, tmp_path / "f32.gguf", "f32")
    spec = load_family(folder)
    with LlamaCpp(tmp_path / "f32.gguf") as loaded:
        context = int(loaded.metadata(f"{spec.gguf.arch}.context_length"))
        tokens = some_tokens(1, min(context, LENGTH))
        found = loaded.logits(tokens[0].tolist())
    with torch.no_grad():
        error = (found - theirs(tokens).logits[0]).abs().max()
    assert error <= GGUF_TOLERANCE[spec.mlp]


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
    assert relative_error(found[:WINDOW], wanted[:WINDOW]) <= TOLERANCE
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


# --- config.json -----------------------------------------------------------------------------------------------------


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
        ("qwen2", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type is 'yarn'"),
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


# --- tests of the tests ----------------------------------------------------------------------------------------------


def without_window(spec: ModelSpec) -> ModelSpec:
    return replace(spec, layers=tuple(replace(layer, window=0) for layer in spec.layers))


def with_window_longer_by(spec: ModelSpec, tokens: int) -> ModelSpec:
    layers = (replace(layer, window=layer.window + tokens if layer.window else 0) for layer in spec.layers)
    return replace(spec, layers=tuple(layers))


def shifted_layers(spec: ModelSpec) -> ModelSpec:
    return replace(spec, layers=spec.layers[1:] + spec.layers[:1])


def with_one_rope(spec: ModelSpec) -> ModelSpec:
    return replace(spec, layers=tuple(replace(layer, rope=spec.rope) for layer in spec.layers))


def without_factor(spec: ModelSpec) -> ModelSpec:
    return replace(spec, layers=tuple(replace(layer, rope=replace(layer.rope, factor=1.0)) for layer in spec.layers))


MUTATIONS = {  # what is wrong → the shape of the model, and the wrong spec
    "nothing": ("qwen2", lambda spec: spec),
    "bias missing": ("qwen2", lambda spec: replace(spec, bias=frozenset())),
    "bias of v missing": ("qwen2", lambda spec: replace(spec, bias=frozenset("qk"))),
    "bias of q missing": ("qwen2", lambda spec: replace(spec, bias=frozenset("kv"))),
    "window missing": ("mistral", without_window),
    "window one too long": ("mistral", lambda spec: with_window_longer_by(spec, 1)),
    "window one too short": ("mistral", lambda spec: with_window_longer_by(spec, -1)),
    "norms of q and k missing": ("qwen3", lambda spec: replace(spec, qk_norm="none")),
    "norm without plus one": ("gemma", lambda spec: replace(spec, norm="rms")),
    "embedding not scaled": ("gemma", lambda spec: replace(spec, embed_scale=1.0)),
    "silu for gelu": ("gemma", lambda spec: replace(spec, mlp="silu")),
    "gemma 2: norm without plus one": ("gemma2", lambda spec: replace(spec, norm="rms")),
    "gemma 2: norms after each half missing": ("gemma2", lambda spec: replace(spec, norm_at="before")),
    "gemma 2: soft cap of the scores missing": ("gemma2", lambda spec: replace(spec, softcap=0.0)),
    "gemma 2: soft cap of the logits missing": ("gemma2", lambda spec: replace(spec, logits_softcap=0.0)),
    "gemma 2: window missing": ("gemma2", without_window),
    "gemma 2: windows in the wrong layers": ("gemma2", shifted_layers),
    "gemma 2: scale by the wrong width": ("gemma2", lambda spec: replace(spec, scale=(spec.dim / spec.heads) ** -0.5)),
    "gemma 3: norm without plus one": ("gemma3", lambda spec: replace(spec, norm="rms")),
    "gemma 3: norms of q and k missing": ("gemma3", lambda spec: replace(spec, qk_norm="none")),
    "gemma 3: window missing": ("gemma3", without_window),
    "gemma 3: windows in the wrong layers": ("gemma3", shifted_layers),
    "gemma 3: one rope for all layers": ("gemma3", with_one_rope),
    "gemma 3: linear factor missing": ("gemma3 linear", without_factor),
    "scale by the wrong width": ("qwen2", lambda spec: replace(spec, scale=spec.dim**-0.5)),
}


@pytest.mark.parametrize("wrong", MUTATIONS)
def test_a_wrong_switch_changes_the_logits_clearly(tmp_path, wrong):
    shape, change = MUTATIONS[wrong]
    theirs = family(tmp_path, shape)
    right = load_model(tmp_path)
    model = Decoder(change(right.spec)).eval()
    model.load_state_dict(right.state_dict(), strict=False)
    tokens = some_tokens(1, LENGTH)
    with torch.no_grad():
        error = relative_error(logits_of(model, tokens), theirs(tokens).logits)
    assert error <= TOLERANCE if wrong == "nothing" else error >= CLEARLY
