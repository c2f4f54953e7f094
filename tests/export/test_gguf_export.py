"""GGUF files in llama.cpp: logits of transformers, ids of our tokenizer; and wrong files, which must be caught."""

import json
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from llama_cpp import LlamaCpp, Refused
from safetensors.torch import load_file, save_file
from tiny_models import LLAMAS, llama
from torch import Tensor

from lumen.errors import ConfigError, ExportError
from lumen.export.gguf import FILE_TYPES, check_gguf, size_label, write_gguf
from lumen.formats.blocks import CODECS
from lumen.formats.gguf import GGUFFile, GGUFTensor, Value, read_gguf, write_gguf_file
from lumen.names import TRANSFORMS
from lumen.text.tokenizer import load_tokenizer

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
VOCAB = 320
TOKENS = 48  # beyond the 32 positions that the llama3 rope was trained on
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_byte_level_tokenizer(folder: Path) -> None:
    """A small tokenizer of Llama 3's kind: bytes, a few merges, four special tokens, BOS in front."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(LLAMA3_SPLIT), "isolated")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog, then the other one"] * 4, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{special[0]} $A", special_tokens=[(special[0], 0)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": special[0], "eos_token": special[1], "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def make_model(folder: Path, **changes) -> transformers.LlamaForCausalLM:
    """A random model with a tokenizer; its weights are two thirds as wide as `llama` draws them.

    The formats' own rounding, byte-equal to ggml's, grows with the width. As drawn (logits of standard deviation 1.3)
    it is over the bars of f16 and q8_0: 1.5e-2 against 1e-2, and a KL of 1.8e-3 against 1e-3 at worst; so narrowed it
    is 5.1e-3 and 3.0e-4. Pretrained weights, as they are, have a test of their own below.
    """
    model = llama(folder, vocab_size=VOCAB, bos_token_id=0, eos_token_id=1, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2 / 3)
    model.save_pretrained(folder)
    write_byte_level_tokenizer(folder)
    return model


def some_ids(count: int = TOKENS) -> list[int]:
    return torch.randint(4, 300, (count,), generator=torch.Generator().manual_seed(3)).tolist()


def logits_of(model: transformers.LlamaForCausalLM, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def logits_in_llama_cpp(path: Path, ids: list[int]) -> Tensor:
    with LlamaCpp(path) as loaded:
        return loaded.logits(ids)


def divergence(found: Tensor, wanted: Tensor) -> float:
    """Mean KL(wanted ‖ found) over positions, in nats."""
    wanted, found = wanted.double().log_softmax(-1), found.double().log_softmax(-1)
    return (wanted.exp() * (wanted - found)).sum(-1).mean().item()


@pytest.fixture(scope="module", params=LLAMAS)
def exported(request, tmp_path_factory) -> tuple[Path, transformers.LlamaForCausalLM]:
    """A model folder and transformers' model of it, for each shape in which Llama checkpoints differ."""
    folder = tmp_path_factory.mktemp(request.param)
    return folder, make_model(folder, **LLAMAS[request.param])


# --- logits ----------------------------------------------------------------------------------------------------------


def test_f32_logits_equal_those_of_transformers(exported):
    folder, model = exported
    write_gguf(folder, folder / "f32.gguf", "f32")
    ids = some_ids()
    assert (logits_in_llama_cpp(folder / "f32.gguf", ids) - logits_of(model, ids)).abs().max() <= 1e-4


def test_f16_logits_are_near_those_of_transformers(exported):
    folder, model = exported
    write_gguf(folder, folder / "f16.gguf", "f16")
    ids = some_ids()
    assert (logits_in_llama_cpp(folder / "f16.gguf", ids) - logits_of(model, ids)).abs().max() <= 1e-2


@pytest.mark.parametrize("quant", ["q8_0", "bf16"])
def test_rounded_weights_say_nearly_the_same(exported, quant):
    folder, model = exported
    write_gguf(folder, folder / f"{quant}.gguf", quant)
    ids = some_ids()
    assert divergence(logits_in_llama_cpp(folder / f"{quant}.gguf", ids), logits_of(model, ids)) <= 1e-3


def test_pretrained_weights_as_they_are_say_nearly_the_same(stories, tmp_path):
    """Their logits have a standard deviation of 9: f16 differs by 1.5e-2 at most, over the 1e-2 of the random models.

    That is the format's rounding: in torch, the weights alone rounded to f16 give 1.1e-2, with the inputs of the linear
    layers, which llama.cpp rounds too, 1.3e-2.
    """
    ids = json.loads((stories / "golden_greedy.json").read_text())["ids"][:TOKENS]
    model = transformers.LlamaForCausalLM.from_pretrained(stories, dtype=torch.float32).eval()
    wanted, found = logits_of(model, ids), {}
    for quant in ("f32", "f16", "q8_0"):
        write_gguf(stories, tmp_path / f"{quant}.gguf", quant)
        found[quant] = logits_in_llama_cpp(tmp_path / f"{quant}.gguf", ids)
    assert (found["f32"] - wanted).abs().max() <= 1e-4
    assert (found["f16"] - wanted).abs().max() <= 2e-2
    assert divergence(found["f16"], wanted) <= 1e-5
    assert divergence(found["q8_0"], wanted) <= 1e-3


def rewrite(
    source: GGUFFile, path: Path, change: Callable[[str, Tensor], Tensor | None], **metadata: Value | None
) -> None:
    """A copy of an f32 file with other tensors and metadata; None leaves one out."""
    values = {name: change(name, source.read_rows(name)) for name in source.tensors}
    tensors = [
        GGUFTensor(
            name=name,
            shape=source.tensors[name].shape,
            type="f32",
            chunks=lambda rows=rows: [CODECS["f32"].encode(rows)],
        )
        for name, rows in values.items()
        if rows is not None
    ]
    changed = {**source.metadata, **{key.replace("__", "."): value for key, value in metadata.items()}}
    write_gguf_file(path, {key: value for key, value in changed.items() if value is not None}, tensors)


def unpermuted(heads: dict[str, int]) -> Callable[[str, Tensor], Tensor]:
    """Undoes the permutation of `attn_q` and `attn_k` as if they had so many heads."""

    def change(name: str, rows: Tensor) -> Tensor:
        part = name.split(".")[-2]
        return TRANSFORMS["rope_pairs"].from_gguf(rows, heads[part]) if part in heads else rows

    return change


WRONG = {  # what is done to a right file of a model with grouped heads and llama3 rope
    "nothing": (lambda name, rows: rows, {}),
    "q and k not permuted": (unpermuted({"attn_q": 4, "attn_k": 2}), {}),
    "k not permuted": (unpermuted({"attn_k": 2}), {}),
    "k permuted by the heads of q": (
        lambda name, rows: (
            TRANSFORMS["rope_pairs"].to_gguf(unpermuted({"attn_k": 2})(name, rows), 4) if "attn_k" in name else rows
        ),
        {},
    ),
    "rope_freqs left out": (lambda name, rows: None if name == "rope_freqs.weight" else rows, {}),
    "rope_freqs inverted": (lambda name, rows: 1 / rows if name == "rope_freqs.weight" else rows, {}),
    "rope base left out": (lambda name, rows: rows, {"llama__rope__freq_base": None}),
    "another epsilon": (lambda name, rows: rows, {"llama__attention__layer_norm_rms_epsilon": Value("f32", 0.1)}),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_file_loads_and_the_logits_give_it_away(tmp_path, wrong):
    model = make_model(tmp_path, **LLAMAS["llama3_rope"])
    write_gguf(tmp_path, tmp_path / "right.gguf", "f32")
    change, metadata = WRONG[wrong]
    rewrite(read_gguf(tmp_path / "right.gguf"), tmp_path / "wrong.gguf", change, **metadata)
    ids = some_ids()
    error = (logits_in_llama_cpp(tmp_path / "wrong.gguf", ids) - logits_of(model, ids)).abs().max()
    assert error <= 1e-4 if wrong == "nothing" else error > 0.1


@pytest.mark.parametrize("wrong", WRONG)
def test_reading_back_tells_a_wrong_file_from_a_right_one(tmp_path, wrong):
    make_model(tmp_path, **LLAMAS["llama3_rope"])
    write_gguf(tmp_path, tmp_path / "right.gguf", "f32")
    change, metadata = WRONG[wrong]
    rewrite(read_gguf(tmp_path / "right.gguf"), tmp_path / "wrong.gguf", change, **metadata)
    if wrong == "nothing":
        check_gguf(tmp_path / "wrong.gguf", tmp_path, "f32")
        return
    with pytest.raises(ExportError, match=r"wrong.gguf: .*(differs from its source in row|was wanted|metadata)"):
        check_gguf(tmp_path / "wrong.gguf", tmp_path, "f32")


@pytest.mark.parametrize("quant", FILE_TYPES)
def test_reading_back_sees_one_changed_byte_of_a_weight(tmp_path, quant):
    make_model(tmp_path)
    path = tmp_path / "m.gguf"
    write_gguf(tmp_path, path, quant)
    info = read_gguf(path).tensors["blk.1.ffn_up.weight"]
    data = bytearray(path.read_bytes())
    data[info.start + info.size_bytes // 2 + 3] ^= 0x40
    path.write_bytes(data)
    with pytest.raises(ExportError, match=r"blk.1.ffn_up.weight differs from its source in row 48"):
        check_gguf(path, tmp_path, quant)


def test_linear_rope_without_its_factor_is_given_away_too(tmp_path):
    model = make_model(tmp_path, **LLAMAS["linear_rope"])
    write_gguf(tmp_path, tmp_path / "right.gguf", "f32")
    scaling = {"llama__rope__scaling__type": None, "llama__rope__scaling__factor": None}
    rewrite(read_gguf(tmp_path / "right.gguf"), tmp_path / "wrong.gguf", lambda name, rows: rows, **scaling)
    ids = some_ids()
    assert (logits_in_llama_cpp(tmp_path / "wrong.gguf", ids) - logits_of(model, ids)).abs().max() > 0.1


def test_a_file_without_its_last_tensor_is_refused_by_llama_cpp(tmp_path):
    make_model(tmp_path)
    write_gguf(tmp_path, tmp_path / "right.gguf", "f32")
    last = "blk.1.ffn_down.weight"
    change = lambda name, rows: None if name == last else rows  # noqa: E731
    rewrite(read_gguf(tmp_path / "right.gguf"), tmp_path / "wrong.gguf", change)
    with pytest.raises(Refused, match=last):
        LlamaCpp(tmp_path / "wrong.gguf")


# --- the real small model --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stories(shared_data) -> Path:
    return shared_data / "models" / "stories260K"


def test_stories260k_gives_the_golden_logits_and_text(stories, tmp_path):
    write_gguf(stories, tmp_path / "stories.gguf", "f32")
    golden = json.loads((stories / "golden_greedy.json").read_text())
    logits = torch.from_numpy(np.load(stories / "golden_logits.npy"))
    with LlamaCpp(tmp_path / "stories.gguf") as loaded:
        ids = golden["ids"][: len(logits)]
        assert (loaded.logits(ids) - logits[: len(ids)]).abs().max() <= 1e-4
        assert loaded.generate([1], len(golden["ids"]) - 1) == golden["ids"][1:]


def test_rows_that_blocks_do_not_divide_fall_back_and_the_report_says_so(stories, tmp_path):
    report = write_gguf(stories, tmp_path / "stories.gguf", "q8_0")
    assert report.types == {"f32": 11, "f16": 5, "q8_0": 31}
    assert report.size_bytes == (tmp_path / "stories.gguf").stat().st_size
    assert len(report.fallbacks) == 5
    assert "blk.0.ffn_down.weight is f16: its rows of 172 are no multiple of 32" in report.fallbacks[0]
    golden = json.loads((stories / "golden_greedy.json").read_text())["ids"][:64]
    logits = torch.from_numpy(np.load(stories / "golden_logits.npy"))[:64]
    assert divergence(logits_in_llama_cpp(tmp_path / "stories.gguf", golden), logits) <= 1e-3


# --- metadata --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", FILE_TYPES)
def test_file_type_is_the_one_that_the_gguf_package_knows(tmp_path, quant):
    model = make_model(tmp_path)
    write_gguf(tmp_path, tmp_path / "m.gguf", quant, name="My model")
    metadata = {key: value.data for key, value in read_gguf(tmp_path / "m.gguf").metadata.items()}
    theirs = "ALL_F32" if quant == "f32" else f"MOSTLY_{quant.upper()}"
    assert metadata["general.file_type"] == gguf.LlamaFileType[theirs]
    assert ("general.quantization_version" in metadata) == (quant == "q8_0")
    assert metadata["general.name"] == "My model"
    assert metadata["general.architecture"] == "llama"
    assert metadata["general.size_label"] == gguf.size_label(model.num_parameters(), 0, 0, 0)


def test_sizes_are_written_as_config_json_has_them(tmp_path):
    make_model(tmp_path, **LLAMAS["wide_heads"])
    write_gguf(tmp_path, tmp_path / "m.gguf", "f32")
    metadata = read_gguf(tmp_path / "m.gguf").metadata
    numbers = {key: value.data for key, value in metadata.items() if key.startswith("llama.") and value.kind == "u32"}
    assert numbers == {
        "llama.context_length": 256,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 96,
        "llama.vocab_size": VOCAB,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 24,
        "llama.attention.value_length": 24,
        "llama.rope.dimension_count": 24,
    }


def test_every_key_is_one_that_the_gguf_package_knows(tmp_path):
    make_model(tmp_path, **LLAMAS["linear_rope"])
    write_gguf(tmp_path, tmp_path / "m.gguf", "q8_0")
    groups = [group for name, group in vars(gguf.Keys).items() if isinstance(group, type)]
    known = {
        text.replace("{arch}", "llama") for group in groups for text in vars(group).values() if isinstance(text, str)
    }
    assert not set(read_gguf(tmp_path / "m.gguf").metadata) - known


@pytest.mark.parametrize("tied", [True, False])
def test_output_weight_is_written_unless_it_is_tied(tmp_path, tied):
    make_model(tmp_path, tie_word_embeddings=tied)
    write_gguf(tmp_path, tmp_path / "m.gguf", "f16")
    assert ("output.weight" in read_gguf(tmp_path / "m.gguf").tensors) == (not tied)


@pytest.mark.parametrize(
    "count", [1_000, 260_032, 999_999, 1_100_048, 1_235_814_400, 8_030_261_248, 70_553_706_496, 2**41]
)
def test_size_label_is_that_of_the_gguf_package(count):
    assert size_label(count) == gguf.size_label(count, 0, 0, 0)


# --- tokenizer -------------------------------------------------------------------------------------------------------


def test_chat_template_and_special_tokens_arrive(tmp_path):
    make_model(tmp_path)
    write_gguf(tmp_path, tmp_path / "m.gguf", "q8_0")
    tokenizer = load_tokenizer(tmp_path)
    with LlamaCpp(tmp_path / "m.gguf", vocab_only=True) as loaded:
        assert loaded.metadata("tokenizer.chat_template") == CHATML
        assert loaded.adds_bos()
        assert loaded.bos() == tokenizer.bos_id
        assert {id for id in range(VOCAB) if loaded.is_eog(id)} == set(tokenizer.stop_ids)
        text = "<|im_start|>user\nthe dog<|im_end|>\n"
        assert loaded.tokenize(text, add_special=True, parse_special=True) == tokenizer.encode(
            text, special_tokens=True
        )
        assert loaded.is_control(tokenizer.token_to_id("<|im_end|>"))
    assert "control-looking token" not in loaded.log


def _tokenizer_folder(shared_data: Path, folder: Path, name: str) -> None:
    """The tokenizer's own files, in the forms in which checkpoints bring them."""
    if name == "qwen2":
        source = shared_data / "tokenizers" / "qwen2"
        transformers.Qwen2Tokenizer.from_pretrained(source).save_pretrained(folder)
    elif name == "stories260K":
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(shared_data / "models" / "stories260K" / file, folder)
    elif name == "stories260K (SentencePiece)":
        shutil.copy(shared_data / "models" / "stories260K" / "tokenizer.model", folder)
    else:
        (source,) = (shared_data / "tokenizers" / "mistral").glob(f"*.{name.removeprefix('mistral_')}")
        shutil.copy(source, folder / "tokenizer.model")


TOKENIZERS = {  # name → of the 106 golden texts, how many llama.cpp cuts otherwise, and which those may be
    "stories260K": (23, lambda text: "  " in text or text != text.strip(" ")),  # the tokenizer drops such blanks
    "stories260K (SentencePiece)": (23, lambda text: "  " in text or text != text.strip(" ")),
    "qwen2": (1, lambda text: not unicodedata.is_normalized("NFC", text)),  # the tokenizer brings text into this form
    "mistral_v1": (0, lambda text: False),
    "mistral_v2": (0, lambda text: False),
    "mistral_v3": (0, lambda text: False),
    "mistral_v7": (0, lambda text: False),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_llama_cpp_cuts_the_golden_texts_into_our_ids_but_for_those_that_the_export_warns_of(
    shared_data, tmp_path, name
):
    _tokenizer_folder(shared_data, tmp_path, name)
    tokenizer = load_tokenizer(tmp_path)
    rows = 151_936 if name == "qwen2" else tokenizer.size  # Qwen's embedding has more rows than there are tokens
    llama(tmp_path, vocab_size=rows, hidden_size=8, num_hidden_layers=1, tie_word_embeddings=True)
    report = write_gguf(tmp_path, tmp_path / "m.gguf", "f16")
    lines = (shared_data / "tokenizers" / "goldens.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    count, may_differ = TOKENIZERS[name]
    with LlamaCpp(tmp_path / "m.gguf", vocab_only=True) as loaded:
        otherwise = [text for text in texts if loaded.tokenize(text, parse_special=True) != tokenizer.encode(text)]
        for text in (text for text in texts if text not in otherwise):
            ids = tokenizer.encode(text, special_tokens=True)
            assert loaded.tokenize(text, add_special=True, parse_special=True) == ids, text
    assert len(texts) == 106 and len(otherwise) == count
    assert all(map(may_differ, otherwise))
    assert bool(report.differences) >= bool(otherwise)


def test_tokens_added_by_a_fine_tune_are_one_id_each(tmp_path):
    make_model(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    first = len(data["model"]["vocab"])
    for id, text in enumerate(("<|tool|>", "<|done|>"), first):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        data["added_tokens"].append({"id": id, "content": text, "special": True, **flags})
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    write_gguf(tmp_path, tmp_path / "m.gguf", "f16")
    with LlamaCpp(tmp_path / "m.gguf", vocab_only=True) as loaded:
        assert loaded.tokenize("<|tool|><|done|>", parse_special=True) == [first, first + 1]


# --- refusals --------------------------------------------------------------------------------------------------------


def change_weight(folder: Path, value: float, dtype: torch.dtype) -> str:
    """Casts the checkpoint and sets one weight of a projection; returns the GGUF name of that tensor."""
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors["model.layers.1.mlp.up_proj.weight"][5, 7] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return "blk.1.ffn_up.weight"


def test_a_bf16_weight_beyond_f16_is_refused_and_fits_into_bf16_exactly(tmp_path):
    make_model(tmp_path)
    name = change_weight(tmp_path, 1e5, torch.bfloat16)
    out = tmp_path / "m.gguf"
    out.write_bytes(b"an older file")
    with pytest.raises(ExportError, match=f"{name}: f16 holds magnitudes up to 65504, found 99840. Export as bf16"):
        write_gguf(tmp_path, out, "f16")
    assert out.read_bytes() == b"an older file"
    assert not list(tmp_path.glob("*.tmp"))
    write_gguf(tmp_path, out, "bf16")
    assert read_gguf(out).read_rows(name)[5, 7] == torch.tensor(1e5).bfloat16()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("quant", FILE_TYPES)
def test_a_weight_that_is_not_finite_is_refused_by_name(tmp_path, value, quant):
    make_model(tmp_path)
    name = change_weight(tmp_path, value, torch.float32)
    with pytest.raises(ExportError, match=f"{name}: wanted finite weights"):
        write_gguf(tmp_path, tmp_path / "m.gguf", quant)
    assert not (tmp_path / "m.gguf").exists()


def test_an_unknown_quant_is_refused_with_the_nearest_name(tmp_path):
    with pytest.raises(ConfigError, match="Did you mean 'q8_0'"):
        write_gguf(tmp_path, tmp_path / "m.gguf", "q8")
