"""The padding token: which one is chosen, that it is never EOS, and that transformers reads the same from the files."""

import json
import shutil
from pathlib import Path

import pytest
import transformers
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Library

from lumen.demo import demo_folder
from lumen.text.padding import choose_pad
from lumen.text.tokenizer import load_tokenizer


def byte_level(folder: Path, *special: str, **config: object) -> Path:
    """A tokenizer of the 256 bytes and `special`, whose EOS is the first of them."""
    folder.mkdir()
    library = Library(models.BPE(vocab={c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": special[0], **config}))
    return folder


@pytest.mark.parametrize(
    ("special", "wanted"),
    [
        (
            ("<e>", "<|im_end|>", "<|reserved_special_token_0|>", "<|finetune_right_pad_id|>"),
            "<|finetune_right_pad_id|>",
        ),
        (("<e>", "<|im_start|>", "<|reserved_special_token_0|>"), "<|reserved_special_token_0|>"),
        (("<e>", "<|placeholder1|>"), "<|placeholder1|>"),
        (("<e>", "<unused3>"), "<unused3>"),
        (("<e>", "[control_12]"), "[control_12]"),
    ],
)
def test_a_token_that_is_there_already_is_chosen_by_its_name(special, wanted, tmp_path):
    tokenizer, note = choose_pad(load_tokenizer(byte_level(tmp_path / "t", *special, pad_token="<e>")), 1000)
    assert tokenizer.id_to_token(tokenizer.pad_id) == wanted
    assert f"The padding token is {wanted!r} (id {tokenizer.pad_id}), not '<e>', which ends an answer." == note


def test_the_files_own_padding_token_stays(tmp_path):
    tokenizer = load_tokenizer(byte_level(tmp_path / "t", "<e>", "<pad>", "<mine>", pad_token="<mine>"))
    assert choose_pad(tokenizer, 1000) == (tokenizer, "")
    demo = load_tokenizer(demo_folder("lumen-demo"))
    assert choose_pad(demo, demo.size) == (demo, "")


def test_a_padding_token_is_made_only_where_a_row_is_free(tmp_path):
    tokenizer = load_tokenizer(byte_level(tmp_path / "t", "<e>", "<|im_end|>"))
    full, note = choose_pad(tokenizer, tokenizer.size)
    assert full is tokenizer and full.pad_id is None and "there is none" in note
    made, note = choose_pad(tokenizer, tokenizer.size + 1)
    assert made.id_to_token(made.pad_id) == "<|pad|>" and made.pad_id == tokenizer.size and "new in a free row" in note
    assert made.encode("a<|pad|>b") == [*tokenizer.encode("a"), made.pad_id, *tokenizer.encode("b")]


def test_eos_that_nothing_can_replace_stays_with_a_word(tmp_path):
    tokenizer = load_tokenizer(byte_level(tmp_path / "t", "<e>", pad_token="<e>"))
    assert choose_pad(tokenizer, tokenizer.size)[1].startswith(
        "No token can be the padding token, and the embedding has no free row for one: '<e>', which ends an answer"
    )


def test_sentencepiece_models_pad_with_a_reserved_piece_or_unk(shared_data, tmp_path):
    for file, wanted in (
        ("tokenizer.model.v1", "<unk>"),
        ("mistral_instruct_tokenizer_240323.model.v3", "[control_12]"),
    ):
        folder = tmp_path / file
        folder.mkdir()
        shutil.copy(shared_data / "tokenizers/mistral" / file, folder / "tokenizer.model")
        tokenizer, _ = choose_pad(load_tokenizer(folder), 100_000)
        assert tokenizer.id_to_token(tokenizer.pad_id) == wanted


@pytest.mark.parametrize("special", [("<e>", "<|reserved_special_token_0|>"), ("<e>", "<|im_end|>")])
def test_transformers_reads_the_chosen_token_and_cuts_text_alike(special, tmp_path):
    folder = byte_level(tmp_path / "t", *special, tokenizer_class="PreTrainedTokenizerFast")
    tokenizer, _ = choose_pad(load_tokenizer(folder), 1000)
    tokenizer.save(folder)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    assert theirs.pad_token_id == tokenizer.pad_id == ours.pad_id and theirs.pad_token_id != theirs.eos_token_id
    for text in ("plain", "a<|pad|>b", f"a{special[1]}b"):
        assert theirs(text, add_special_tokens=False).input_ids == ours.encode(text) == tokenizer.encode(text)
    assert json.loads((folder / "generation_config.json").read_text())["pad_token_id"] == tokenizer.pad_id
