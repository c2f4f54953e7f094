"""The text halves of Qwen's vision checkpoints, whose positions have three parts: made and judged by transformers.

What they have in common with other vision checkpoints is in `test_text_only.py`.
"""

import json

import peft
import pytest
import torch
import transformers
from llama_cpp import FOLDER, LlamaCpp
from test_text_only import QWENS, SECTIONS, SHAPES, TOKENS, change_config, logits, refusal, vision_model
from tiny_models import relative_error

from lumen.adapter import load_adapter
from lumen.checkpoint import linear_layers, load_model, save_model
from lumen.errors import ExportError
from lumen.export.gguf import told_of_llama_cpp, write_gguf
from lumen.export.merge import merge
from lumen.formats.gguf import Value, read_gguf
from lumen.page import read_page
from lumen.sampling import generate
from lumen.spec import load_family


@pytest.mark.parametrize("shape", QWENS[:2])
def test_a_config_that_does_not_nest_gives_the_same_model(tmp_path, shape):
    """As the hub has Qwen2-VL and 2.5-VL: the text model's settings at the top, the rope called mrope."""
    theirs = vision_model(tmp_path, shape)
    nested = load_family(tmp_path)

    def flat(config):
        text = config.pop("text_config")
        config["torch_dtype"] = config.pop("dtype")
        config["vision_token_id"] = 151654
        ropes = text.pop("rope_parameters")
        assert ropes["mrope_section"] == SECTIONS
        text |= {"rope_theta": ropes["rope_theta"], "rope_scaling": {"type": "mrope", "mrope_section": SECTIONS}}
        for key in ("layer_types", "head_dim", "model_type", "pad_token_id"):
            text.pop(key)
        config |= text | {"sliding_window": 32768, "max_window_layers": 7}

    change_config(tmp_path, flat)
    model = load_model(tmp_path)
    assert (model.spec.layers, model.spec.tied) == (nested.layers, nested.tied)
    assert (model.spec.rope.kind, model.spec.rope.sections) == ("mrope", tuple(SECTIONS))
    with torch.no_grad():
        assert relative_error(logits(model), theirs(TOKENS).logits) < 1e-5
    (tmp_path / "saved").mkdir()
    save_model(model, tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/config.json").read_text())
    assert not [key for key in saved if key.startswith(("vision", "image", "video"))]
    assert (saved["model_type"], saved["mrope_section"], saved["rope_scaling"]) == ("qwen2", SECTIONS, None)


@pytest.mark.parametrize("shape", QWENS)
def test_documents_of_a_row_and_answers_to_a_batch_are_those_of_the_whole_model(tmp_path, shape):
    theirs = vision_model(tmp_path, shape)
    model = load_model(tmp_path)
    rows = [TOKENS[0, :9].tolist(), TOKENS[1].tolist(), TOKENS[0, 9:12].tolist()]
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    document = torch.repeat_interleave(torch.arange(3), torch.tensor([len(row) for row in rows]))[None]
    with torch.no_grad():
        packed = model.logits(model(torch.tensor([[token for row in rows for token in row]]), positions, document))
        for row, found in zip(rows, packed.split([len(row) for row in rows], dim=1), strict=True):
            assert relative_error(found, theirs(torch.tensor([row])).logits) < 1e-5
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    answers = generate(model, rows, max_tokens=12, stop_ids=())  # the shorter ones are padded
    for row, answer in zip(rows, answers, strict=True):
        assert row + answer.ids == theirs.generate(torch.tensor([row]), **options)[0].tolist()


@pytest.mark.parametrize(("shape", "size"), [("qwen2-vl", "72b"), ("qwen2.5-vl", "72b"), ("qwen3-vl", None)])
def test_what_a_text_config_may_leave_out_is_what_transformers_fills_in(tmp_path, shape, size):
    page, word, *_ = SHAPES[shape]
    theirs = getattr(transformers, f"{word}TextConfig")().to_dict()
    defaults = dict(read_page(page).text_half.defaults)
    assert defaults.pop("model_type") == page[:5] and theirs["model_type"].startswith(page[:5])
    if shape == "qwen3-vl":
        vision = transformers.Qwen3VLConfig().vision_config
        assert defaults.pop("deepstack_layers") == len(vision.deepstack_visual_indexes)
    else:
        assert theirs["rope_parameters"]["rope_theta"] == defaults.pop("rope_theta")
    assert all(theirs[key] == value for key, value in defaults.items())
    text = {"rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [24, 20, 20]}}
    config = {"architectures": [f"{word}ForConditionalGeneration"], "text_config": text | {"rope_theta": 5e6}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = load_family(tmp_path)
    assert (spec.vocab, spec.dim, spec.rope.theta) == (theirs["vocab_size"], theirs["hidden_size"], 5e6)
    if size:
        found = {key: getattr(spec, key) for key in read_page(page).sizes[size] if key != "layers"}
        assert found | {"layers": len(spec.layers)} == read_page(page).sizes[size]


@pytest.mark.parametrize(
    ("shape", "rope", "words"),
    [
        ("qwen2.5-vl", {"mrope_section": [16, 24, 24]}, "mrope_section wants numbers that sum to 16"),
        ("qwen2.5-vl", {"mrope_section": None}, "text_config.rope_parameters.mrope_section wants three whole numbers"),
        ("qwen2.5-vl", {"mrope_interleaved": True}, "mrope_interleaved is True; family 'qwen2-vl' wants False"),
        ("qwen2.5-vl", {"type": "yarn", "factor": 4.0}, "rope_type is 'yarn'; family 'qwen2-vl' wants 'default'"),
        ("qwen3-vl", {"mrope_interleaved": False}, "mrope_interleaved is False; family 'qwen3-vl' wants True"),
        ("qwen3-vl", {"mrope_section": [4, 6, 6]}, "mrope_section wants numbers that can take turns"),
        ("qwen3-vl", {"mrope_section": [5, 5, 6]}, "mrope_section wants numbers that can take turns"),
    ],
)
def test_positions_that_are_not_those_of_the_vision_model_are_refused(tmp_path, shape, rope, words):
    vision_model(tmp_path, shape)
    change_config(tmp_path, lambda config: config["text_config"]["rope_parameters"].update(rope))
    assert words in refusal(tmp_path) and str(tmp_path / "config.json") in refusal(tmp_path)


@pytest.mark.parametrize(
    ("shape", "ropes", "words"),
    [
        ("qwen3-vl", {"rope_scaling": None}, "text_config.rope_scaling.mrope_section wants three whole numbers"),
        ("qwen3-vl", {}, "text_config.rope_scaling.mrope_section wants three whole numbers"),
        ("qwen2-vl", {"rope_scaling": {"type": "mrope"}}, "text_config.rope_scaling.mrope_section wants three whole"),
        ("qwen2-vl", {"rope_scaling": ["mrope"]}, "rope_scaling wants an object, found ['mrope']"),
        ("qwen2-vl", {"model_type": ["qwen2_vl_text"]}, "model_type is ['qwen2_vl_text']; family 'qwen2-vl' wants"),
    ],
)
def test_a_vision_model_without_sections_is_told_where_they_belong(tmp_path, shape, ropes, words):
    vision_model(tmp_path, shape)

    def edit(config):
        if "model_type" not in ropes:
            config["text_config"].pop("rope_parameters")
        config["text_config"] |= {"rope_theta": 1e6} | ropes

    change_config(tmp_path, edit)
    assert words in refusal(tmp_path) and str(tmp_path / "config.json") in refusal(tmp_path)


def test_sections_may_stand_in_either_rope(tmp_path):
    vision_model(tmp_path, "qwen2-vl")
    found = load_family(tmp_path).rope
    change_config(tmp_path, lambda config: config["text_config"].update(rope_scaling={"rope_type": "default"}))
    assert load_family(tmp_path).rope == found and found.sections == tuple(SECTIONS)


def test_without_a_text_config_the_sections_belong_at_the_top(tmp_path):
    config = {"architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl", "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert f"{tmp_path}/config.json: rope_scaling.mrope_section wants three whole numbers" in refusal(tmp_path)


@pytest.mark.parametrize("shape", QWENS)
def test_the_gguf_file_of_a_text_half_has_the_logits_of_the_whole_model_in_llama_cpp(tmp_path, shape):
    """Both of the vision checkpoint itself and of its text half, merged: neither forgets what an image would need."""
    theirs = vision_model(tmp_path / "vision", shape)
    merge(tmp_path / "vision", tmp_path / "merged")
    with torch.no_grad():
        wanted = theirs(TOKENS[:1]).logits[0]
    for folder in ("vision", "merged"):
        report = write_gguf(tmp_path / folder, tmp_path / f"{folder}.gguf", "f32")
        metadata = read_gguf(report.path).metadata
        arch = {"qwen2-vl": "qwen2vl", "qwen3-vl": "qwen3vl"}[SHAPES[shape][0]]
        assert metadata["general.architecture"].data == arch
        assert metadata[f"{arch}.rope.dimension_sections"] == Value("i32[]", (*SECTIONS, 0))
        if arch == "qwen3vl":
            assert metadata["qwen3vl.n_deepstack_layers"] == Value("u32", 1) and not report.differences
        else:
            assert report.differences[0].endswith("made for 1e-07: its logits differ slightly.")
        with LlamaCpp(report.path) as loaded:
            assert (loaded.logits(TOKENS[0].tolist()) - wanted).abs().max() <= 2e-4


@pytest.mark.parametrize("shape", QWENS)
def test_an_adapter_has_the_gradients_that_peft_has_in_the_whole_vision_model(tmp_path, shape):
    theirs = vision_model(tmp_path / "base", shape)
    targets = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, target_modules=targets))
    theirs.base_model.model.name_or_path = str(tmp_path / "base")
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    model = load_model(tmp_path / "base")
    load_adapter(model, tmp_path / "adapter")
    for found in (logits(model), theirs(TOKENS).logits):
        torch.nn.functional.cross_entropy(found[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
    layers = theirs.base_model.model.model.language_model.layers
    found = {role: layer.lora for role, layer in linear_layers(model).items()}
    assert len(found) == 7 * len(layers)
    for role, pair in found.items():
        name = model.spec.names.by_role(role).checkpoint.removeprefix("model.layers.")
        layer = layers.get_submodule(name)
        assert relative_error(pair.a.grad, layer.lora_A.default.weight.grad) <= 1e-5, role
        assert relative_error(pair.b.grad, layer.lora_B.default.weight.grad) <= 1e-5, role


def test_a_gguf_file_that_would_fit_no_projector_is_refused(tmp_path):
    vision_model(tmp_path / "vision", "qwen3-vl")
    merge(tmp_path / "vision", tmp_path / "merged")
    change_config(tmp_path / "merged", lambda config: config.pop("deepstack_layers"))
    with pytest.raises(ExportError, match=r"config\.json: deepstack_layers wants a whole number, found None"):
        write_gguf(tmp_path / "merged", tmp_path / "f32.gguf", "f32")


def test_pairs_that_llama_cpp_does_not_turn_in_a_text_are_told(tmp_path):
    """As of the published sections, 24, 20, 20: height and width end before their last turns."""
    vision_model(tmp_path, "qwen3-vl")
    ropes = {"mrope_section": [8, 4, 4], "rope_theta": 100.0}
    change_config(tmp_path, lambda config: config["text_config"]["rope_parameters"].update(ropes))
    report = write_gguf(tmp_path, tmp_path / "f32.gguf", "f32")
    (told,) = (line for line in report.differences if line.startswith("Positions"))
    assert "Positions: 2 of the 16 pairs of a head, which turn by 1.5 radians at most" in told
    model = load_model(tmp_path)
    with LlamaCpp(report.path) as loaded, torch.no_grad():
        found = loaded.logits(TOKENS[0].tolist())
        assert relative_error(found, logits(model)[0]) > 0.01
        model.rotation._frequencies["full"][[13, 14]] = 0
        assert (found - logits(model)[0]).abs().max() <= 2e-4


def test_the_epsilon_that_llama_cpp_does_not_add_is_told_with_its_version(tmp_path):
    """A large one, which the logits show: they are those of a model without it."""
    vision_model(tmp_path, "qwen2-vl")
    change_config(tmp_path, lambda config: config["text_config"].update(rms_norm_eps=0.1))
    report = write_gguf(tmp_path, tmp_path / "f32.gguf", "f32")
    model = load_model(tmp_path)
    change_config(tmp_path, lambda config: config["text_config"].update(rms_norm_eps=0.0))
    without = load_model(tmp_path)
    with LlamaCpp(report.path) as loaded, torch.no_grad():
        found = loaded.logits(TOKENS[0].tolist())
        assert (found - logits(without)[0]).abs().max() <= 2e-4
        assert relative_error(found, logits(model)[0]) > 0.01
    version = json.loads((FOLDER / "_nlcBuildMetadata.json").read_text())["buildOptions"]["llamaCpp"]["release"]
    (told,) = report.differences
    assert told.startswith(f"Norms: in a 'qwen2vl' model llama.cpp {version.removeprefix('v')} adds no epsilon")


def test_what_llama_cpp_does_not_turn_of_the_published_size_is_little(tmp_path):
    text = {
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 36, "hidden_size": 4096},
        **{"intermediate_size": 12288, "max_position_embeddings": 262144, "rope_theta": 5e6},
        **{"model_type": "qwen3_vl_text", "head_dim": 128, "vocab_size": 151936},
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
    }
    config = {"architectures": ["Qwen3VLForConditionalGeneration"], "text_config": text, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = load_family(tmp_path)
    assert {key: getattr(spec, key) for key in ("dim", "heads", "kv_heads", "head_dim", "mlp_dim", "vocab")} == {
        key: value for key, value in read_page("qwen3-vl").sizes["8b"].items() if key != "layers"
    }
    assert spec.rope.interleaved and spec.config["deepstack_layers"] == 3
    (told,) = told_of_llama_cpp(spec)
    assert told.startswith("Positions: 2 of the 64 pairs of a head, which turn by 0.11 radians at most")
