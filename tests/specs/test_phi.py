"""What few pages have: checkpoint tensors that hold several roles, longrope and yarn in GGUF, the turns of Phi."""

import json
from dataclasses import replace

import peft
import pytest
import torch
import transformers
from llama_cpp import LlamaCpp
from proofs import TOLERANCE
from safetensors.torch import load_file, save_file
from test_families import logits_of, some_tokens
from tiny_models import byte_level_tokenizer, family, relative_error

from lumen.adapter import attach_lora, load_adapter, lora_pairs, save_adapter
from lumen.checkpoint import linear_layers, load_model
from lumen.config import Lora
from lumen.errors import CheckpointError, ExportError
from lumen.export.gguf import write_gguf
from lumen.export.merge import merge
from lumen.names import checkpoint_tensors, gguf_tensors
from lumen.ops.nf4 import dequantize_nf4, quantize_nf4
from lumen.page import read_page
from lumen.spec import Family, load_family
from lumen.text.chat_format import write_jinja
from lumen.text.template import ChatTemplate
from lumen.text.tokenizer import load_tokenizer

CLEARLY = 0.05  # relative: what a slip must at least do to the logits
FUSED = {"self_attn.qkv_proj": ("attn.q", "attn.k", "attn.v"), "mlp.gate_up_proj": ("mlp.gate", "mlp.up")}
TOKENS = some_tokens(2, 40)


# --- one tensor, several roles ---------------------------------------------------------------------------------------


def test_roles_lie_in_a_tensor_in_the_order_of_the_page(tmp_path):
    family(tmp_path, "phi4")
    spec = load_family(tmp_path)
    sizes = {"attn.q": 64, "attn.k": 32, "attn.v": 32, "mlp.gate": 96, "mlp.up": 96}
    by_role = {name.role: name for name in spec.tensors()}
    for module, roles in FUSED.items():
        found = spec.names.by_checkpoint(f"model.layers.1.{module}")
        assert [name.role for name in found] == [f"blocks.1.{role}" for role in roles]
        first = 0
        for role in roles:  # role → place in the checkpoint → role
            [part] = by_role[f"blocks.1.{role}.weight"].parts
            assert (part.name, part.first, part.rows) == (f"model.layers.1.{module}.weight", first, sizes[role])
            first += part.rows
    shapes = {tensor.name: tensor.shape for tensor in checkpoint_tensors(spec.tensors())}
    assert shapes["model.layers.0.self_attn.qkv_proj.weight"] == (128, 64)
    shapes = {tensor.name: tensor.shape for tensor in gguf_tensors(spec.tensors())}
    assert shapes["blk.0.ffn_up.weight"] == (192, 64)
    assert len(shapes) == 3 + 3 * 6


@pytest.mark.parametrize("pair", [("attn.q", "attn.k"), ("attn.k", "attn.v"), ("mlp.gate", "mlp.up")])
def test_parts_in_the_wrong_order_are_caught(tmp_path, monkeypatch, pair):
    theirs = family(tmp_path, "phi4")
    page = read_page("phi4")
    group, first, second = pair[0].split(".")[0], *(role.split(".")[1] for role in pair)
    other = {first: second, second: first}
    rows = page.tensors["block"][group]
    swapped = page.tensors["block"] | {group: {other.get(role, role): row for role, row in rows.items()}}
    wrong = Family(replace(page, tensors=page.tensors | {"block": swapped})).bind(load_family(tmp_path).config)
    assert relative_error(logits_of(load_model(tmp_path), TOKENS), theirs(TOKENS).logits) <= TOLERANCE
    monkeypatch.setattr("lumen.checkpoint.load_family", lambda folder: wrong)
    assert relative_error(logits_of(load_model(tmp_path), TOKENS), theirs(TOKENS).logits) >= CLEARLY


def test_a_fused_tensor_of_another_size_is_refused_by_its_name(tmp_path):
    family(tmp_path, "phi4")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.qkv_proj.weight"] = torch.zeros(120, 64)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"qkv_proj.weight' wants shape \(128, 64\), found \(120, 64\)"):
        load_model(tmp_path)


def test_nf4_packs_the_parts_one_by_one(tmp_path):
    family(tmp_path, "phi4")
    tensors = load_file(tmp_path / "model.safetensors")
    model = load_model(tmp_path, nf4=True)
    for module, roles in FUSED.items():
        layers = [model.get_submodule(f"blocks.2.{role}") for role in roles]
        rows = tensors[f"model.layers.2.{module}.weight"].split([layer.outputs for layer in layers])
        for layer, own in zip(layers, rows, strict=True):
            assert layer.weight is None
            assert torch.equal(layer.nf4.codes, quantize_nf4(own).codes)
            assert torch.equal(dequantize_nf4(layer.nf4), dequantize_nf4(quantize_nf4(own)))


def test_a_checkpoint_that_bitsandbytes_packed_is_split_without_a_change(tmp_path):
    family(tmp_path / "dense", "phi4", hidden_size=128, num_attention_heads=8, intermediate_size=128)
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    packed = transformers.Phi3ForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=settings)
    packed.save_pretrained(tmp_path / "packed")
    theirs = transformers.Phi3ForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32).dequantize()
    ours = load_model(tmp_path / "packed", nf4=True)
    assert all(layer.nf4 is not None for layer in linear_layers(ours).values())
    assert relative_error(logits_of(ours, TOKENS), theirs(TOKENS).logits) <= TOLERANCE


# --- adapters --------------------------------------------------------------------------------------------------------


def randomize(model) -> None:
    """B starts at zero, which would make any mistake invisible."""
    with torch.no_grad():
        for pair in lora_pairs(model).values():
            pair.b.normal_(0, 0.1)


def read_back(folder):
    """PEFT's model of the adapter in `folder`."""
    model = transformers.Phi3ForCausalLM.from_pretrained(folder.parent / "base", attn_implementation="eager")
    return peft.PeftModel.from_pretrained(model, folder).eval()


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 8},
        {"r": 4, "lora_alpha": 8, "use_rslora": True},
        {"r": 4, "lora_alpha": 8, "rank_pattern": {"qkv_proj": 2}, "alpha_pattern": {"gate_up_proj": 5}},
        {"r": 4, "lora_alpha": 8, "use_dora": True},
    ],
    ids=lambda settings: " ".join(settings),
)
def test_a_pair_of_peft_beside_a_fused_layer_is_loaded_and_written_back_as_it_was(tmp_path, settings):
    base = family(tmp_path / "base", "phi4")
    config = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False, **settings)
    torch.manual_seed(0)
    theirs = peft.get_peft_model(base, config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "base")
    lora = load_adapter(model, tmp_path / "theirs")
    assert relative_error(logits_of(model, TOKENS), theirs(TOKENS).logits) <= TOLERANCE
    (tmp_path / "ours").mkdir()
    save_adapter(model, tmp_path / "ours", lora, str(tmp_path / "base"))
    wanted, found = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours"))
    assert found.keys() == wanted.keys()
    for key in wanted:
        assert torch.equal(found[key], wanted[key]), key
    assert relative_error(read_back(tmp_path / "ours")(TOKENS).logits, theirs(TOKENS).logits) <= TOLERANCE
    merge_and_compare(tmp_path, "theirs", theirs)


@pytest.mark.parametrize(
    ("lora", "ranks"),
    [
        (Lora(rank=4, alpha=8.0), {12, 8, 4}),
        (Lora(rank=4, alpha=8.0, rslora=True), {12, 8, 4}),
        (Lora(rank=3, targets=("attn.q", "attn.v", "mlp.up")), {6, 3}),
        (Lora(rank=4, dora=True), {12, 8, 4}),
    ],
    ids=["plain", "rslora", "some roles", "dora"],
)
def test_separate_pairs_are_written_as_one_with_the_same_effect(tmp_path, lora, ranks):
    family(tmp_path / "base", "phi4")
    byte_level_tokenizer(tmp_path / "base")
    torch.manual_seed(0)
    model = load_model(tmp_path / "base")
    attach_lora(model, lora)
    randomize(model)
    (tmp_path / "adapter").mkdir()
    save_adapter(model, tmp_path / "adapter", lora, str(tmp_path / "base"))
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert {values.shape[0] for key, values in tensors.items() if "lora_A" in key} == ranks
    assert not any("q_proj" in key for key in tensors)
    theirs = read_back(tmp_path / "adapter")
    assert relative_error(theirs(TOKENS).logits, logits_of(model, TOKENS)) <= TOLERANCE
    assert relative_error(theirs(TOKENS).logits, logits_of(load_model(tmp_path / "base"), TOKENS)) >= CLEARLY
    merge_and_compare(tmp_path, "adapter", theirs)

    again = load_model(tmp_path / "base")
    load_adapter(again, tmp_path / "adapter")
    assert relative_error(logits_of(again, TOKENS), logits_of(model, TOKENS)) <= 1e-6
    if lora.dora:  # whose parts stay one pair
        return
    before, after = lora_pairs(model), lora_pairs(again)
    assert before.keys() == after.keys()
    for role, pair in before.items():  # each role has its own pair again: training goes on as it was
        assert torch.equal(after[role].a, pair.a) and torch.equal(after[role].b, pair.b)
        assert after[role].scale == pytest.approx(pair.scale)


def merge_and_compare(folder, adapter: str, theirs) -> None:
    """The merged folder of the adapter has, in transformers, the logits of PEFT's model."""
    byte_level_tokenizer(folder / "base")
    config = folder / adapter / "adapter_config.json"
    settings = json.loads(config.read_text()) | {"base_model_name_or_path": str(folder / "base")}
    config.write_text(json.dumps(settings))
    merge(folder / adapter, folder / "merged")
    merged = transformers.Phi3ForCausalLM.from_pretrained(folder / "merged", attn_implementation="eager")
    assert relative_error(merged(TOKENS).logits, theirs(TOKENS).logits) <= TOLERANCE


def test_pairs_that_shared_their_a_until_they_were_trained_are_written_apart(tmp_path):
    base = family(tmp_path / "base", "phi4")
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["qkv_proj"], init_lora_weights=False, r=4, lora_alpha=8)
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "base")
    lora = load_adapter(model, tmp_path / "theirs")
    with torch.no_grad():
        lora_pairs(model)["blocks.0.attn.k"].a.add_(0.3)
    (tmp_path / "ours").mkdir()
    save_adapter(model, tmp_path / "ours", lora, str(tmp_path / "base"))
    ranks = {key.split(".")[4]: value.shape[0] for key, value in
             load_file(tmp_path / "ours/adapter_model.safetensors").items() if "lora_A" in key}  # fmt: skip
    assert ranks == {"0": 12, "1": 4, "2": 4}
    assert relative_error(read_back(tmp_path / "ours")(TOKENS).logits, logits_of(model, TOKENS)) <= TOLERANCE


def test_an_adapter_for_other_rows_is_refused(tmp_path):
    base = family(tmp_path / "base", "phi4")
    config = peft.LoraConfig(target_modules=["qkv_proj"], init_lora_weights=False, r=4)
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "theirs")
    family(tmp_path / "other", "phi4", num_key_value_heads=4)
    with pytest.raises(CheckpointError, match="qkv_proj' wants 192 rows, found 128"):
        load_adapter(load_model(tmp_path / "other"), tmp_path / "theirs")


def test_merging_into_the_nf4_image_gives_the_model_that_was_trained(tmp_path):
    family(tmp_path / "base", "phi4")
    byte_level_tokenizer(tmp_path / "base")
    model = load_model(tmp_path / "base", nf4=True)
    lora = Lora(rank=4, alpha=8.0)
    attach_lora(model, lora)
    randomize(model)
    (tmp_path / "adapter").mkdir()
    save_adapter(model, tmp_path / "adapter", lora, str(tmp_path / "base"))
    merge(tmp_path / "adapter", tmp_path / "merged", base="nf4")
    assert all(layer.nf4 is not None for layer in linear_layers(model).values())
    merged = transformers.Phi3ForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    assert relative_error(merged(TOKENS).logits, logits_of(model, TOKENS)) <= TOLERANCE


# --- GGUF: beyond the original context -------------------------------------------------------------------------------


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
FAR = {"rope_theta": 100.0, "max_position_embeddings": 128}


def gguf_of(folder, shape: str, **changes: object):
    """A model of that shape, narrow as in test_family_gguf.py, and its GGUF file."""
    theirs = family(folder, shape, **changes)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2 / 3)
    theirs.save_pretrained(folder)
    byte_level_tokenizer(folder)
    write_gguf(folder, folder / "m.gguf", "f32", name="tiny")
    return theirs, folder / "m.gguf"


@pytest.mark.parametrize(
    ("shape", "scaling"),
    [
        ("qwen2", YARN),
        ("qwen2", YARN | {"attention_factor": 0.7}),
        ("qwen2", YARN | {"mscale": 0.7, "mscale_all_dim": 2.0}),
        ("qwen2", YARN | {"factor": 1.0}),
        *[(shape, YARN) for shape in ("llama2", "mistral v0.2", "mistral small", "mixtral")],
        *[(shape, YARN) for shape in ("qwen3", "qwen2-moe", "qwen3-moe")],
    ],
)
def test_yarn_in_llama_cpp_beyond_the_original_context(tmp_path, shape, scaling):
    # transformers 5.17 computes no yarn for a Mixtral that leaves head_dim out
    theirs, path = gguf_of(tmp_path, shape, rope_scaling=scaling, head_dim=16, **FAR)
    tokens = some_tokens(1, 100)
    assert relative_error(logits_of(load_model(tmp_path), tokens), theirs(tokens).logits) <= TOLERANCE
    arch = load_family(tmp_path).gguf.arch
    with LlamaCpp(path) as loaded, torch.no_grad():
        found, wanted = loaded.logits(tokens[0].tolist()), theirs(tokens).logits[0]
        assert loaded.metadata(f"{arch}.rope.scaling.original_context_length") == "32"
    assert (found - wanted).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("shape", "changes", "key"),
    [
        ("qwen2", {"rope_scaling": YARN, **FAR}, "qwen2.rope.scaling.type"),
        ("qwen2", {"rope_scaling": YARN, **FAR}, "qwen2.rope.scaling.factor"),
        ("qwen2", {"rope_scaling": YARN, **FAR}, "qwen2.rope.scaling.original_context_length"),
        ("qwen2", {"rope_scaling": YARN | {"attention_factor": 0.7}, **FAR}, "qwen2.rope.scaling.attn_factor"),
        ("phi4-mini", {}, "phi3.rope.scaling.attn_factor"),
        ("phi4", {}, "phi3.rope.freq_base"),
    ],
)
def test_a_gguf_file_without_one_of_its_keys_gives_other_logits(tmp_path, shape, changes, key):
    theirs, path = gguf_of(tmp_path, shape, **changes)
    data = path.read_bytes()
    assert data.count(key.encode()) == 1
    tokens = some_tokens(1, 8 if shape == "phi4-mini" else 100)  # of phi4-mini one window
    path.write_bytes(data.replace(key.encode(), key[:-1].encode() + b"_"))  # a key that llama.cpp does not know
    with LlamaCpp(path) as loaded, torch.no_grad():
        assert relative_error(loaded.logits(tokens[0].tolist()), theirs(tokens).logits[0]) >= CLEARLY


@pytest.mark.parametrize(("tokens", "context"), [(100, 256), (300, 512)])
@pytest.mark.parametrize("shape", ["phi3 longrope", "phi4-mini"])
def test_longrope_in_llama_cpp_on_both_sides_of_the_original_context(tmp_path, shape, tokens, context):
    """llama.cpp chooses the list by the context that it is opened with, transformers by the length of the text."""
    long = {"original_max_position_embeddings": 280, "max_position_embeddings": 1024, "sliding_window": 1024}
    theirs, path = gguf_of(tmp_path, shape, **long)
    ids = some_tokens(1, tokens)
    with LlamaCpp(path, context=context) as loaded, torch.no_grad():
        found, wanted = loaded.logits(ids[0].tolist()), theirs(ids).logits[0]
        assert loaded.metadata("phi3.context_length") == "1024"
    assert (found - wanted).abs().max() <= 1e-4
    with LlamaCpp(path, context=768 - context) as loaded:  # the other list
        other = loaded.logits(ids[0, :100].tolist())
    assert relative_error(other, wanted[:100]) >= CLEARLY


def test_long_and_short_divisors_that_change_places_in_the_file_are_caught(tmp_path):
    theirs, path = gguf_of(tmp_path, "phi4-mini")
    rope, data = load_family(tmp_path).rope, path.read_bytes()
    values = [torch.tensor(divisors).numpy().tobytes() for divisors in (rope.long, rope.short)]
    assert [data.count(value) for value in values] == [1, 1]
    (first, second), size = (data.index(value) for value in values), len(values[0])
    assert first < second
    path.write_bytes(data[:first] + values[1] + data[first + size : second] + values[0] + data[second + size :])
    ids = some_tokens(1, 8)
    with LlamaCpp(path) as loaded, torch.no_grad():
        assert relative_error(loaded.logits(ids[0].tolist()), theirs(ids).logits[0]) >= CLEARLY


PHI3_TOKENS = {"</s>": True, "<unk>": False, "<s>": False, "<|user|>": True, "<|end|>": True}  # → drops blanks after it


@pytest.mark.parametrize(
    ("drops", "name", "written"),
    [
        (True, "my model", "my model (Phi-3)"),
        (True, "my-PHI-3-mini", "my-PHI-3-mini"),
        (False, "not-Phi3.5", "not-Phi 3.5"),
        (False, "plain", "plain"),
    ],
)
def test_the_name_in_the_file_makes_llama_cpp_treat_blanks_as_the_tokenizer_does(tmp_path, drops, name, written):
    family(tmp_path, "phi3")
    byte_level_tokenizer(tmp_path)
    document = json.loads((tmp_path / "tokenizer.json").read_text())
    added = document["added_tokens"]
    if drops:
        for text, rstrip in PHI3_TOKENS.items():
            added.append(added[0] | {"id": 300 + len(added), "content": text, "rstrip": rstrip})
        for number, token in enumerate(added[2:], len(document["model"]["vocab"])):
            token["id"] = number
        added[1]["rstrip"] = True  # <|im_end|>, as all special tokens but three
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    assert write_gguf(tmp_path, tmp_path / "m.gguf", "f32", name=name).differences == ()
    text = "<|user|>\n a fox<|end|>  <|im_end|>\n<s> the<|endoftext|> dog </s> lazy"
    with LlamaCpp(tmp_path / "m.gguf", vocab_only=True) as loaded:
        assert loaded.metadata("general.name") == written
        found = loaded.tokenize(text, parse_special=True)
    assert found == load_tokenizer(tmp_path).encode(text, special_tokens=True)


@pytest.mark.parametrize("changes", [{"beta_fast": 16.0}, {"beta_slow": 2.0}, {"truncate": False}])
def test_a_yarn_that_llama_cpp_does_not_know_is_not_exported(tmp_path, changes):
    with pytest.raises(ExportError, match=r"llama\.cpp knows yarn with beta_fast, beta_slow and truncate at"):
        gguf_of(tmp_path, "qwen2", rope_scaling=YARN | changes, **FAR)


# --- turns -----------------------------------------------------------------------------------------------------------

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?\n"},
    {"role": "assistant", "content": " 1"},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "2"},
]


@pytest.mark.parametrize(
    ("page", "file"), [("phi3", "llamacpp__microsoft-Phi-3.5-mini-instruct"), ("phi4", "axolotl__phi_4")]
)
@pytest.mark.parametrize("turns", [2, 3, 4, 5])
def test_a_page_writes_the_turns_that_the_models_own_template_does(shared_data, page, file, turns):
    theirs = (shared_data / f"chat_templates/{file}.jinja").read_text("utf-8")
    prompt = TALK[turns - 1]["role"] == "user"
    ours, wanted = (
        ChatTemplate(source, eos_token="<|endoftext|>").render(TALK[:turns], add_generation_prompt=prompt)
        for source in (write_jinja(Family.load(page).page.chat), theirs)
    )
    assert ours == wanted


def test_the_turns_of_phi4_mini_have_no_line_feeds():
    """The format that its model card names: <|system|>…<|end|><|user|>…<|end|><|assistant|>."""
    template = ChatTemplate(write_jinja(Family.load("phi4-mini").page.chat), eos_token="<|endoftext|>")
    wanted = "<|system|>Be brief.<|end|><|user|>One?\n<|end|><|assistant|> 1<|end|>"
    assert template.render(TALK[:2], add_generation_prompt=True) == wanted.removesuffix(" 1<|end|>")
    assert template.render(TALK[:3]) == wanted + "<|endoftext|>"
    assert template.render(TALK[:3], add_generation_prompt=True) == wanted + "<|assistant|>"
