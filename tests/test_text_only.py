"""The text half of vision checkpoints, made and judged by transformers."""

import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import byte_level_tokenizer, relative_error

from lumen.adapter import attach_lora, load_adapter, save_adapter
from lumen.checkpoint import linear_layers, load_model, save_model
from lumen.config import Lora
from lumen.errors import CheckpointError, SpecError
from lumen.export.merge import merge
from lumen.export.nf4 import write_nf4
from lumen.formats.safetensors import TensorFiles
from lumen.model_config import read_config
from lumen.page import read_page
from lumen.peft_files import WEIGHTS_FILE
from lumen.spec import load_family

TOKENS = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(4))
POSITIONS = torch.arange(40).expand(2, 40)
TEXT = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
LINEAR_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 3000.0},
}
SECTIONS = [6, 5, 5]  # pairs of a head of 32 that turn by time, height and width
QWEN_TEXT = {
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-7},  # heads of D / H, as theirs are
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": SECTIONS},
}
QWEN_VISION = {"depth": 1, "num_heads": 2, "num_attention_heads": 2}
QWENS = ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"]
SHAPES = {  # what is made → the page of its text half, the first word of its classes, its configs
    "gemma3": (
        "gemma3",
        "Gemma3",
        {"query_pre_attn_scalar": 24, "sliding_window": 8, "rope_parameters": LINEAR_ROPE},
        {},
        {"mm_tokens_per_image": 4},
    ),
    "mistral3 tied": (
        "mistral-v0.2",
        "Mistral3",
        {"model_type": "mistral", "sliding_window": None},
        {"model_type": "pixtral", "head_dim": 16},
        {},
    ),
    "mistral3": (
        "mistral-small",
        "Mistral3",
        {
            "model_type": "mistral",
            "sliding_window": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e9},
        },
        {"model_type": "pixtral", "head_dim": 16},
        {"tie_word_embeddings": False},
    ),
    "qwen2-vl": (
        "qwen2-vl",
        "Qwen2VL",
        QWEN_TEXT,
        QWEN_VISION | {"embed_dim": 32, "mlp_ratio": 2, "hidden_size": 64},
        {"tie_word_embeddings": True},
    ),
    "qwen2.5-vl": (
        "qwen2-vl",
        "Qwen2_5_VL",
        QWEN_TEXT,
        QWEN_VISION | {"out_hidden_size": 64, "fullatt_block_indexes": [0]},
        {"tie_word_embeddings": False},
    ),
    "qwen3-vl": (
        "qwen3-vl",
        "Qwen3VL",
        QWEN_TEXT,
        QWEN_VISION | {"out_hidden_size": 64, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        {"tie_word_embeddings": True},
    ),
}
UNTIED = ("mistral3", "qwen2.5-vl")
NEW_PREFIXES = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
    # of Qwen: 3-VL has them on the hub, too, and the others do not nest there
    "model.language_model.": "model.language_model.",
    "model.visual.": "model.visual.",
    "visual.": "model.visual.",
    "model.": "model.language_model.",
    "lm_head.": "lm_head.",
}


def vision_model(folder, shape):
    """Writes a random vision model into `folder`, as transformers does for the hub; returns transformers' own of it."""
    _, word, text, vision, own = SHAPES[shape]
    # through JSON, since transformers writes into the dictionaries that it is given
    halves = json.loads(json.dumps({"text_config": TEXT | text, "vision_config": VISION | vision}))
    config = getattr(transformers, f"{word}Config")(**halves, **own)
    config._attn_implementation = "eager"
    torch.manual_seed(7)
    model = getattr(transformers, f"{word}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(-0.5, 0.5) if word == "Gemma3" else parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.12)
    model.save_pretrained(folder)
    byte_level_tokenizer(folder)
    return model


def new_spelling(folder):
    """Gives the tensors in `folder` the names that transformers 5 has for them in memory."""
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        old = next(prefix for prefix in NEW_PREFIXES if name.startswith(prefix))
        tensors[NEW_PREFIXES[old] + name.removeprefix(old)] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder, edit):
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


def logits(model):
    return model.logits(model(TOKENS, POSITIONS))


# Loading


@pytest.mark.parametrize("spelling", ["hub", "transformers 5"])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_of_text_equal_those_of_the_whole_model(tmp_path, shape, spelling):
    theirs = vision_model(tmp_path, shape)
    if spelling == "transformers 5":
        new_spelling(tmp_path)
        assert "model.language_model.norm.weight" in TensorFiles(tmp_path).names()
    model = load_model(tmp_path)
    assert model.spec.name == SHAPES[shape][0] and (model.head is None) == (shape not in UNTIED)
    with torch.no_grad():
        assert relative_error(logits(model), theirs(TOKENS).logits) < 1e-5


def test_the_vision_tensors_are_left_aside_and_that_is_said_in_one_line(tmp_path, caplog):
    vision_model(tmp_path, "gemma3")
    load_model(tmp_path)
    stored = [name for name in TensorFiles(tmp_path).names() if not name.startswith("language_model")]
    assert len(stored) > 20
    (line,) = caplog.messages
    assert line == f"{tmp_path}: the text half of a vision model; {len(stored)} vision tensors are left aside."


@pytest.mark.parametrize("shape", ["gemma3", "mistral3"])
def test_the_config_as_the_hub_has_it_gives_the_same_model(tmp_path, shape):
    """Classic spelling, the dtype outside, and of Gemma 3 nothing that its class fills in."""
    theirs = vision_model(tmp_path, shape)

    def classic(config):
        text = config["text_config"]
        config["torch_dtype"] = config.pop("dtype")
        for key in ("bos_token_id", "eos_token_id", "tie_word_embeddings"):
            config[key] = text.pop(key, None)
        ropes = text.pop("rope_parameters")
        if shape == "mistral3":
            text["rope_theta"] = ropes["rope_theta"]
            return
        text |= {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_local_base_freq": 3000.0}
        for key in ("layer_types", "rms_norm_eps", "attention_bias", "hidden_activation", "_sliding_window_pattern"):
            del text[key]

    change_config(tmp_path, classic)
    model = load_model(tmp_path)
    assert model.spec.config["torch_dtype"] == "float32" and model.spec.config["eos_token_id"] == 1
    with torch.no_grad():
        assert relative_error(logits(model), theirs(TOKENS).logits) < 1e-5


def test_what_a_gemma_text_config_may_leave_out_is_what_transformers_fills_in(tmp_path):
    theirs = transformers.Gemma3TextConfig().to_dict()
    ropes = theirs["rope_parameters"]
    theirs["rope_theta"] = ropes["full_attention"]["rope_theta"]
    theirs["rope_local_base_freq"] = ropes["sliding_attention"]["rope_theta"]
    assert all(theirs[key] == value for key, value in read_page("gemma3").text_half.defaults.items())
    sizes = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    text = sizes | {"model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text, "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec, page = load_family(tmp_path), read_page("gemma3").sizes["4b"]
    assert {key: getattr(spec, key) for key in page if key != "layers"} | {"layers": len(spec.layers)} == page
    assert (spec.window, spec.rope.factor, spec.window_rope.theta) == (1024, 8.0, 1e4)


# Refusals


def refusal(folder):
    with pytest.raises((CheckpointError, SpecError)) as refused:
        load_model(folder)
    return str(refused.value)


def test_a_tensor_of_neither_half_and_one_that_is_there_twice_are_refused(tmp_path):
    vision_model(tmp_path, "mistral3")
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"audio_tower.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    assert "'audio_tower.weight'" in refusal(tmp_path)
    norm = "language_model.model.norm.weight"
    save_file(tensors | {"model.language_model.norm.weight": tensors[norm].clone()}, tmp_path / "model.safetensors")
    assert "are both 'model.norm.weight'" in refusal(tmp_path)
    del tensors[norm]
    save_file(tensors, tmp_path / "model.safetensors")
    assert "the first is 'model.norm.weight'" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda config: config.update(text_config=7), "text_config wants an object, found 7"),
        (lambda config: config["text_config"].update(model_type="ministral3"), "model_type is 'ministral3'"),
        (
            lambda config: config.update(architectures=["Mistral4ForConditionalGeneration"]),
            "nearest known is 'Mistral3For",
        ),
        (lambda config: config.update(architectures=["Qwen3VLMoeForConditionalGeneration"]), "another layout"),
        (lambda config: config["text_config"].update(hidden_size=128), "hidden_size (128 by config.json, 64 here)"),
    ],
)
def test_a_config_that_does_not_describe_a_known_text_half_is_refused(tmp_path, edit, words):
    vision_model(tmp_path, "mistral3")
    change_config(tmp_path, edit)
    assert words in refusal(tmp_path)


# What leaves is a text model


@pytest.mark.parametrize("shape", SHAPES)
def test_a_merged_text_half_loads_in_transformers_as_a_text_model_with_equal_logits(tmp_path, shape):
    vision_model(tmp_path / "vision", shape)
    model = load_model(tmp_path / "vision")
    torch.manual_seed(0)
    for pair in attach_lora(model, Lora(rank=4, alpha=8.0)).values():
        torch.nn.init.normal_(pair.b, 0, 0.05)
    (tmp_path / "adapter").mkdir()
    save_adapter(model, tmp_path / "adapter", Lora(rank=4, alpha=8.0), str(tmp_path / "vision"))
    merge(tmp_path / "adapter", tmp_path / "merged")
    text = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    assert type(text).__name__ == read_page(SHAPES[shape][0]).architecture
    with torch.no_grad():
        assert relative_error(logits(model), text(TOKENS).logits) < 1e-5
        assert relative_error(logits(load_model(tmp_path / "merged")), text(TOKENS).logits) < 1e-5
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert not {"text_config", "vision_config", "quantization_config"} & config.keys()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_saved_text_half_loads_in_transformers_with_equal_logits(tmp_path, shape):
    theirs = vision_model(tmp_path / "vision", shape)
    (tmp_path / "saved").mkdir()
    save_model(load_model(tmp_path / "vision"), tmp_path / "saved")
    text = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        assert relative_error(text(TOKENS).logits, theirs(TOKENS).logits) < 1e-6


@pytest.mark.parametrize(
    ("shape", "spelling"), [("gemma3", "hub"), ("gemma3", "transformers 5"), *[(shape, "hub") for shape in QWENS]]
)
def test_the_text_half_of_a_vision_checkpoint_in_nf4_keeps_its_blocks(tmp_path, shape, spelling):
    vision_model(tmp_path / "dense", shape)
    nf4 = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    with torch.compiler.set_stance("force_eager"):  # else bitsandbytes compiles for each shape, seconds at a time
        whole = getattr(transformers, f"{SHAPES[shape][1]}ForConditionalGeneration")
        theirs = whole.from_pretrained(
            tmp_path / "dense", quantization_config=nf4, dtype=torch.float32, attn_implementation="eager"
        ).train()
        theirs.save_pretrained(tmp_path / "packed")
        byte_level_tokenizer(tmp_path / "packed")
        if spelling == "transformers 5":
            new_spelling(tmp_path / "packed")
        model = load_model(tmp_path / "packed", nf4=True)
        for role, layer in linear_layers(model).items():
            name = model.spec.names.by_role(role).checkpoint.removeprefix("model.")
            assert torch.equal(layer.nf4.codes, theirs.model.language_model.get_submodule(name).weight.data.flatten())
        kinds = {"token_type_ids": torch.zeros_like(TOKENS)} if shape == "gemma3" else {}  # no token of an image
        assert relative_error(logits(model), theirs(TOKENS, **kinds).logits) < 1e-5
    merge(tmp_path / "packed", tmp_path / "merged")
    assert "quantization_config" not in read_config(tmp_path / "merged")
    assert torch.equal(logits(load_model(tmp_path / "merged")), logits(model))
    write_nf4(tmp_path / "packed", tmp_path / "text")
    assert read_config(tmp_path / "text")["architectures"] == [read_page(SHAPES[shape][0]).architecture]
    assert torch.equal(logits(load_model(tmp_path / "text", nf4=True)), logits(model))


# Adapters of whole vision models


@pytest.mark.parametrize("shape", ["gemma3", *QWENS])
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": r".*language_model.*\.(q_proj|down_proj)"},
        {"target_modules": ["q_proj", "v_proj", "up_proj"], "use_rslora": True},
        {"target_modules": "all-linear"},  # of every tower some
        {
            "target_modules": ["k_proj"],
            "rank_pattern": {r"model\.language_model\.layers\.1\.self_attn\.k_proj": 2},
            "alpha_pattern": {r"language_model\.layers\.2\.self_attn\.k_proj": 32},
        },
    ],
)
def test_an_adapter_that_peft_trained_on_a_whole_vision_model_is_read_beside_its_text_half(
    tmp_path, caplog, settings, shape
):
    theirs = vision_model(tmp_path / "base", shape)
    theirs.name_or_path = str(tmp_path / "base")
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, **settings))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    assert any(".model.language_model.layers." in name for name in load_file(tmp_path / "adapter" / WEIGHTS_FILE))
    model = load_model(tmp_path / "base")
    wanted = theirs(TOKENS).logits
    assert relative_error(logits(model), wanted) > 0.05
    load_adapter(model, tmp_path / "adapter")
    assert relative_error(logits(model), wanted) <= 1e-5
    keys = load_file(tmp_path / "adapter" / WEIGHTS_FILE)
    vision = [key for key in keys if not key.startswith("base_model.model.model.language_model.")]
    assert vision or settings["target_modules"] != "all-linear"
    said = [f"{tmp_path / 'adapter'}: {len(vision)} tensors of the adapter change the vision half and are left aside."]
    assert [message for message in caplog.messages if "of the adapter" in message] == (said if vision else [])
    merge(tmp_path / "adapter", tmp_path / "merged")
    assert relative_error(logits(load_model(tmp_path / "merged")), wanted) <= 1e-5


@pytest.mark.parametrize("shape", ["qwen2-vl", "qwen2.5-vl"])
def test_an_adapter_with_the_names_that_transformers_4_had_for_qwen_is_read(tmp_path, caplog, shape):
    """Text layers as of a text model, the tower beside them: as the hub's checkpoints of Qwen2-VL and 2.5-VL."""
    theirs = vision_model(tmp_path / "base", shape)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / WEIGHTS_FILE
    old = {
        key.replace(".model.model.language_model.", ".model.model.").replace(
            ".model.model.visual.", ".model.visual."
        ): part
        for key, part in load_file(path).items()
    }
    save_file(old, path, metadata={"format": "pt"})
    vision = [key for key in old if key.startswith("base_model.model.visual.")]
    assert vision and all(".model.model.layers." in key for key in old.keys() - set(vision))
    model = load_model(tmp_path / "base")
    load_adapter(model, tmp_path / "adapter")
    assert relative_error(logits(model), theirs(TOKENS).logits) <= 1e-5
    assert f"{len(vision)} tensors of the adapter change the vision half" in caplog.messages[-1]


def test_an_embedding_that_peft_trained_in_a_vision_model_is_read(tmp_path):
    theirs = vision_model(tmp_path / "base", "mistral3")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    theirs = peft.get_peft_model(theirs, lora)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    theirs.save_pretrained(tmp_path / "adapter")
    model = load_model(tmp_path / "base")
    load_adapter(model, tmp_path / "adapter")
    assert relative_error(logits(model), theirs(TOKENS).logits) <= 1e-5
