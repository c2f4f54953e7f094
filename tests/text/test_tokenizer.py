"""Tokenizers against sentencepiece, transformers and the stored reference ids; and against files that lie."""

import copy
import json
import random
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import transformers

from lumen.errors import CheckpointError, DataError
from lumen.text.tokenizer import StreamDecoder, Tokenizer, load_tokenizer, tokenizer_of
from lumen.text.tokenizer_files import BYTE_OF
from lumen.text.tokens import Token, TokenKind, Vocabulary

MISTRAL = {
    "mistral_v1": "tokenizer.model.v1",
    "mistral_v2": "mistral_instruct_tokenizer_240216.model.v2",
    "mistral_v3": "mistral_instruct_tokenizer_240323.model.v3",
    "mistral_v7": "mistral_instruct_tokenizer_241114.model.v7",
}
NAMES = ["stories260K", "stories260K.model", "qwen2", *MISTRAL]

ODD_TEXTS = (
    "",
    " ",
    "  two spaces before and after  ",
    "\n\n\tline feeds\r\n",
    "naïve café, 你好, สวัสดี, \U0001f469\u200d\U0001f4bb, \ufffd, e\u0301",
    "12345 3.14 '’s DON'T",
)


@pytest.fixture(scope="session")
def goldens(shared_data: Path) -> list[dict]:
    lines = (shared_data / "tokenizers/goldens.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="session")
def folders(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model's folder for each tokenizer of the reference data."""
    root = tmp_path_factory.mktemp("tokenizers")
    stories = shared_data / "models/stories260K"
    found = {"stories260K": stories, "stories260K.model": root / "stories260K.model", "qwen2": root / "qwen2"}
    found["stories260K.model"].mkdir()
    shutil.copy(stories / "tokenizer.model", found["stories260K.model"])
    for name, file in MISTRAL.items():
        found[name] = root / name
        found[name].mkdir()
        shutil.copy(shared_data / "tokenizers/mistral" / file, found[name] / "tokenizer.model")
    transformers.AutoTokenizer.from_pretrained(shared_data / "tokenizers/qwen2").save_pretrained(found["qwen2"])
    return found


@pytest.fixture(scope="session")
def loaded(folders: dict[str, Path]) -> dict[str, Tokenizer]:
    return {name: load_tokenizer(folder) for name, folder in folders.items()}


def plain(rows: list[dict], tokenizer: Tokenizer) -> list[dict]:
    """The rows whose text holds no special token: the reference ids were made without looking for any."""
    special = [tokenizer.id_to_token(id) for id in tokenizer.special_ids]
    return [row for row in rows if not any(text in row["text"] for text in special)]


def processor(folder: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


# --- against references ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_ids_equal_the_reference_ids(name, loaded, goldens):
    tokenizer = loaded[name]
    # The reference for Qwen 2 parsed special tokens; sentencepiece knows none.
    rows = goldens if name == "qwen2" else plain(goldens, tokenizer)
    assert len(rows) >= 104
    for row in rows:
        assert tokenizer.encode(row["text"]) == row[name.removesuffix(".model")], row["text"]


@pytest.mark.parametrize("name", ["stories260K.model", *MISTRAL])
def test_decoding_equals_sentencepiece(name, loaded, folders, goldens):
    tokenizer, reference = loaded[name], processor(folders[name])
    for row in goldens:
        ids = tokenizer.encode(row["text"])
        assert tokenizer.decode(ids, skip_special=True) == reference.decode(ids), row["text"]


@pytest.mark.parametrize("name", ["stories260K.model", "mistral_v3"])
def test_broken_bytes_decode_as_in_sentencepiece(name, loaded, folders):
    tokenizer, reference = loaded[name], processor(folders[name])
    bytes_ = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
    letters = [tokenizer.token_to_id(letter) for letter in "abc"]
    generator = random.Random(0)
    for _ in range(2000):
        ids = generator.choices(bytes_[0x20:0x7F] + bytes_[0x80:] * 3 + letters * 40, k=12)
        ids = [tokenizer.token_to_id("a"), *ids]  # sentencepiece has its own ideas of blanks at the very beginning
        assert tokenizer.decode(ids) == reference.decode(ids), ids


@pytest.mark.parametrize("name", ["qwen2"])
def test_random_ids_decode_as_in_transformers(name, loaded, folders):
    reference = transformers.AutoTokenizer.from_pretrained(folders[name])
    generator = random.Random(1)
    for _ in range(500):
        ids = [generator.randrange(loaded[name].size) for _ in range(20)]
        for skip in (False, True):
            wanted = reference.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert loaded[name].decode(ids, skip_special=skip) == wanted, ids


@pytest.mark.parametrize("name", ["stories260K", "qwen2"])
def test_ids_with_special_tokens_equal_transformers(name, loaded, folders, goldens):
    reference = transformers.AutoTokenizer.from_pretrained(folders[name])
    texts = [row["text"] for row in goldens] + list(ODD_TEXTS)
    texts += ["<s>Once</s> upon <unk>", "<|im_start|>user\nHi<|im_end|>\n"]
    if name == "stories260K":
        # transformers' LlamaTokenizer sets up its own rules; the plain class has those of tokenizer.json.
        reference = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folders[name] / "tokenizer.json"))
    for text in texts:
        assert loaded[name].encode(text, special_tokens=True) == reference(text)["input_ids"], text
        assert loaded[name].encode(text) == reference(text, add_special_tokens=False)["input_ids"], text


def test_tokenizer_json_and_tokenizer_model_agree(loaded, goldens):
    from_json, from_model = loaded["stories260K"], loaded["stories260K.model"]
    assert from_json.tokens == from_model.tokens
    assert (from_json.bos_id, from_json.eos_id, from_json.unk_id) == (1, 2, 0)
    assert (from_model.bos_id, from_model.eos_id, from_model.unk_id, from_model.pad_id) == (1, 2, 0, None)
    for row in goldens:
        ids = from_json.encode(row["text"])
        assert from_json.decode(ids) == from_model.decode(ids)


@pytest.mark.parametrize("name", ["qwen2", *MISTRAL])
def test_text_survives_the_round_trip(name, loaded, goldens):
    for text in [row["text"] for row in plain(goldens, loaded[name])] + list(ODD_TEXTS):
        wanted = unicodedata.normalize("NFC", text) if name == "qwen2" else text  # Qwen 2 has that normalizer
        assert loaded[name].decode(loaded[name].encode(text)) == wanted


# --- streaming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_streamed_pieces_join_to_the_whole(name, loaded, goldens):
    tokenizer = loaded[name]
    generator = random.Random(2)
    rows = [tokenizer.encode(row["text"], special_tokens=True) for row in goldens]
    rows += [[generator.randrange(tokenizer.size + 9) for _ in range(30)] for _ in range(200)]
    for ids in rows:
        for skip in (False, True):
            decoder = StreamDecoder(tokenizer, skip_special=skip)
            pieces = [decoder.push(id) for id in ids] + [decoder.flush()]
            assert "".join(pieces) == tokenizer.decode(ids, skip_special=skip)


@pytest.mark.parametrize("name", NAMES)
def test_a_character_is_never_split(name, loaded):
    text = "a\U0001f469\u200d\U0001f4bbb 你好 é"
    decoder = StreamDecoder(loaded[name])
    pieces = [decoder.push(id) for id in loaded[name].encode(text)]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == text
    assert decoder.flush() == ""


def test_an_unfinished_character_comes_out_with_flush(loaded):
    tokenizer = loaded["mistral_v3"]
    decoder = StreamDecoder(tokenizer)
    ids = [tokenizer.token_to_id(text) for text in ("▁a", "<0xE4>", "<0xBD>")]
    assert [decoder.push(id) for id in ids] == ["a", "", ""]
    assert decoder.flush() == "\ufffd\ufffd"
    assert decoder.push(ids[0]) == "a"  # a new text, so the dummy prefix goes again


# --- offsets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_offsets_point_at_the_text_of_each_token(name, loaded, goldens):
    tokenizer = loaded[name]
    for text in [row["text"] for row in goldens] + list(ODD_TEXTS):
        ids, offsets = tokenizer.encode_with_offsets(text)
        assert ids == tokenizer.encode(text)
        assert all(0 <= start <= end <= len(text) for start, end in offsets)
        assert offsets == sorted(offsets)
        for id, (start, end) in zip(ids, offsets, strict=True):
            covered, said = text[start:end], tokenizer.bytes_of(id)
            if unicodedata.is_normalized("NFC", text):
                assert said.strip() in covered.encode(), (text, said, covered)


@pytest.mark.parametrize("name", ["qwen2", *MISTRAL])
def test_offsets_cover_every_character(name, loaded, goldens):
    for text in [row["text"] for row in goldens] + list(ODD_TEXTS):
        offsets = loaded[name].encode_with_offsets(text)[1]
        covered = {at for start, end in offsets for at in range(start, end)}
        if unicodedata.is_normalized("NFC", text):  # else a mark that went into its letter is nobody's
            assert covered == set(range(len(text)))


@pytest.mark.parametrize("name", NAMES)
def test_bytes_of_one_character_share_its_offsets(name, loaded):
    _, offsets = loaded[name].encode_with_offsets("x \U00013080\U00013080y")
    shared = [span for span in offsets if offsets.count(span) > 1]
    assert set(shared) <= {(0, 1), (1, 2), (1, 3), (2, 3), (3, 4)} and len(shared) >= 4


# --- special tokens --------------------------------------------------------------------------------------------------


def test_special_text_becomes_one_id(loaded):
    assert loaded["qwen2"].encode("<|im_start|>user\nhi<|im_end|>") == [151644, 872, 198, 6023, 151645]
    mistral = loaded["mistral_v3"]
    ids, offsets = mistral.encode_with_offsets("<s>[INST] hi[/INST]")
    assert [mistral.id_to_token(id) for id in ids] == ["<s>", "[INST]", "▁", "▁hi", "[/INST]"]
    assert offsets == [(0, 3), (3, 9), (9, 9), (9, 12), (12, 19)]
    assert mistral.decode(ids) == "<s>[INST]  hi[/INST]"
    assert mistral.decode(ids, skip_special=True) == " hi"


def test_bos_and_eos_follow_the_template_then_the_config(tmp_path, shared_data, loaded):
    assert loaded["stories260K"].encode("a", special_tokens=True)[0] == 1
    assert (loaded["qwen2"].prefix, loaded["qwen2"].add_bos) == ((), False)
    assert loaded["mistral_v1"].prefix == (1,)
    stories = json.loads((shared_data / "models/stories260K/tokenizer.json").read_text())
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": False, "add_eos_token": True}
    found = load_tokenizer(write(tmp_path / "a", stories, config))
    assert (found.prefix, found.suffix, found.add_bos, found.add_eos) == ((1,), (), True, False)
    found = load_tokenizer(write(tmp_path / "b", stories | {"post_processor": None}, config))
    assert (found.prefix, found.suffix, found.add_bos, found.add_eos) == ((), (2,), False, True)
    found = load_tokenizer(write(tmp_path / "c", stories | {"post_processor": None}, {}))
    assert (found.prefix, found.suffix) == ((), ())


def test_answers_end_at_eos_at_generation_config_and_at_known_turn_ends(tmp_path):
    document = byte_level("<|begin|>", "<|eos|>", "<|eot_id|>", "<|other|>")
    folder = write(tmp_path / "a", document, {"eos_token": "<|eos|>"})
    assert load_tokenizer(folder).stop_ids == (257, 258)
    (folder / "generation_config.json").write_text('{"eos_token_id": [259, 257]}')
    assert load_tokenizer(folder).stop_ids == (257, 259, 258)
    (folder / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(CheckpointError, match=r"generation_config.json: eos_token_id"):
        load_tokenizer(folder)


def test_a_named_token_is_special_even_if_tokenizer_json_does_not_say_so(tmp_path):
    document = byte_level("<|eos|>")
    document["added_tokens"] = []
    document["model"]["vocab"]["<|eos|>"] = 256
    assert load_tokenizer(write(tmp_path / "a", document, {})).encode("a<|eos|>") != [BYTE_OF_A, 256]
    named = load_tokenizer(write(tmp_path / "b", document, {"eos_token": "<|eos|>"}))
    assert named.encode("a<|eos|>") == [BYTE_OF_A, 256]
    assert named.special_ids == {256}


def test_added_tokens_extend_a_sentencepiece_model(tmp_path, folders):
    folder = tmp_path / "m"
    shutil.copytree(folders["mistral_v1"], folder)
    (folder / "added_tokens.json").write_text('{"<|im_end|>": 32001, "<|im_start|>": 32000, "<tool>": 32002}')
    config = {
        "added_tokens_decoder": {"32000": {"content": "<|im_start|>", "special": True}},
        "eos_token": "<|im_end|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    found = load_tokenizer(folder)
    assert found.encode("<|im_start|>user<tool><|im_end|>") == [32000, *found.encode("user"), 32002, 32001]
    assert (found.size, found.eos_id, found.bos_id) == (32003, 32001, 1)
    assert {32000, 32001} <= found.special_ids and 32002 not in found.special_ids
    assert found.stop_ids == (32001,)


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", ["<|eos|>", "a"])
def test_another_padding_token_is_what_reading_the_saved_files_gives(tmp_path, pad):
    folder = write(tmp_path / "own", byte_level("<|eos|>", "<|im_end|>"), {"eos_token": "<|im_end|>"})
    given = load_tokenizer(folder).with_roles(pad_token=pad)
    read = tokenizer_of(given.files)
    for name in ("tokens", "pad_id", "eos_id", "bos_id", "unk_id", "prefix", "suffix", "stop_ids", "special_ids"):
        assert getattr(given, name) == getattr(read, name), name
    assert given.id_to_token(given.pad_id) == pad and dict(given.files) == dict(read.files)
    assert given.encode("a<|eos|>b") == read.encode("a<|eos|>b")


def test_an_unknown_token_that_pads_is_cut_out_of_texts_as_when_the_saved_files_are_read(tmp_path):
    document = byte_level()
    document["model"]["vocab"]["<unk>"] = 256  # of the model alone, not among the added tokens
    document["model"]["unk_token"] = "<unk>"
    given = load_tokenizer(write(tmp_path / "own", document, {})).with_roles(pad_token="<unk>")
    assert given.encode("a<unk>b") == tokenizer_of(given.files).encode("a<unk>b")
    assert len(given.encode("a<unk>b")) == 3


def test_a_sound_vocabulary_at_once_is_that_of_its_tokens_one_by_one():
    ids = {"a": 2, "b": 0, "<|x|>": 5}
    once, singly = Vocabulary(Path("t")), Vocabulary(Path("t"))
    once.add_all(ids, "vocab")
    for text, id in ids.items():
        singly.add(text, id, TokenKind.NORMAL, "vocab")
    assert once.ids == singly.ids and once.tokens() == singly.tokens()
    assert once.texts(TokenKind.NORMAL) == singly.texts(TokenKind.NORMAL) == list(ids)
    assert {type(token) for token in once.tokens()} == {Token, type(None)}


def test_chat_template_is_found_wherever_it_is_kept(tmp_path):
    document = byte_level()
    assert load_tokenizer(write(tmp_path / "a", document, {})).chat_template is None
    assert load_tokenizer(write(tmp_path / "b", document, {"chat_template": "one"})).chat_template == "one"
    several = [{"name": "tool_use", "template": "two"}, {"name": "default", "template": "three"}]
    folder = write(tmp_path / "c", document, {"chat_template": several})
    assert load_tokenizer(folder).chat_template == "three"
    (folder / "chat_template.jinja").write_text("four\n")
    assert load_tokenizer(folder).chat_template == "four\n"
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json: chat_template.*found int"):
        load_tokenizer(write(tmp_path / "d", document, {"chat_template": 7}))


def test_a_saved_tokenizer_is_the_same_and_bears_its_new_template(tmp_path, loaded, goldens):
    for name in ("qwen2", "mistral_v7"):
        folder = tmp_path / name
        folder.mkdir()
        loaded[name].with_chat_template("{{ 'ü' }}").save(folder)
        again = load_tokenizer(folder)
        assert again.chat_template == "{{ 'ü' }}"
        assert again.tokens == loaded[name].tokens and again.prefix == loaded[name].prefix
        assert all(again.encode(row["text"]) == loaded[name].encode(row["text"]) for row in goldens[::7])
    assert loaded["mistral_v7"].chat_template is None
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "qwen2").chat_template == "{{ 'ü' }}"


def test_a_folder_without_a_tokenizer_is_refused(tmp_path, shared_data):
    with pytest.raises(CheckpointError, match="found neither"):
        load_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match=r"vocab\.json.*transformers"):
        load_tokenizer(shared_data / "tokenizers/qwen2")


def test_without_sentencepiece_the_error_says_what_to_install(folders):
    code = (
        "import sys; sys.modules['sentencepiece'] = None\n"  # what an import of an absent package finds
        "from lumen.errors import ConfigError\nfrom lumen.text.tokenizer import load_tokenizer\n"
        f"try: load_tokenizer({str(folders['mistral_v1'])!r})\nexcept ConfigError as error: print(error)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "pip install 'lumen[sentencepiece]'" in found.stdout


# --- files that lie --------------------------------------------------------------------------------------------------

BYTE_OF_A = sorted(BYTE_OF).index("a")


def byte_level(*special: str) -> dict:
    """A tokenizer.json with one token for each byte and the special tokens from id 256 on."""
    library = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={text: id for id, text in enumerate(sorted(BYTE_OF))}, merges=[])
    )
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    library.add_special_tokens(list(special))
    return json.loads(library.to_str())


def write(folder: Path, document: dict, config: dict) -> Path:
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(document))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def spm_like(vocab: dict[str, int]) -> dict:
    document = byte_level()
    document["model"] |= {"vocab": vocab, "byte_fallback": True}
    document["decoder"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}
    return document


def with_added(**changes: object) -> dict:
    document = byte_level("<|eos|>")
    document["added_tokens"][0] |= changes
    return document


def with_model(**model: object) -> dict:
    return byte_level() | {"model": {"type": "BPE", "merges": []} | model}


LIES = {
    "two texts with one id": (with_model(vocab={"a": 0, "b": 0}), {}, "model.vocab: 'b' is given id 0"),
    "an id far out of range": (with_model(vocab={"a": 2**31}), {}, "model.vocab: a text with an id below"),
    "a negative byte token": (spm_like({"a": 0, "<0x-1>": 1}), {}, "<0x00> to <0xFF>, found '<0x-1>'"),
    "a byte token with three digits": (spm_like({"a": 0, "<0x100>": 1}), {}, "found '<0x100>'"),
    "a byte token in small letters": (spm_like({"a": 0, "<0x0a>": 1}), {}, "found '<0x0a>'"),
    "an added token with a taken id": (with_added(id=3), {}, "added_tokens[0]: '<|eos|>' is given id 3"),
    "an added token after a gap": (with_added(id=300), {}, "without a gap"),
    "a name that no token bears": (byte_level("<|eos|>"), {"eos_token": "<|eof|>"}, "Did you mean '<|eos|>'?"),
    "a name that is a number": (byte_level(), {"bos_token": 7}, "bos_token: the text of a token was wanted, found 7"),
    "another id for an added token": (
        byte_level("<|eos|>"),
        {"added_tokens_decoder": {"9": {"content": "<|eos|>", "special": True}}},
        "has no '<|eos|>' with id 9",
    ),
    "an id that is a word": (byte_level(), {"added_tokens_decoder": {"../x": {"content": "a"}}}, "an id was wanted"),
    "a switch that is a word": (byte_level(), {"add_bos_token": "yes"}, "add_bos_token: true or false was wanted"),
    "a BOS without a name": (byte_level(), {"add_bos_token": True}, "there is no bos_token"),
    "a model of words": (with_model(type="WordLevel", vocab={"a": 0}, unk_token="a"), {}, "found 'WordLevel'"),
    "no decoder": (byte_level() | {"decoder": None}, {}, "was wanted, found none"),
    "merges of unknown tokens": (with_model(vocab={"a": 0}, merges=[["a", "b"]]), {}, "library cannot read it"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_lies_is_refused_by_name(lie, tmp_path):
    document, config, message = LIES[lie]
    with pytest.raises(CheckpointError) as error:
        load_tokenizer(write(tmp_path / "folder", document, config))
    assert message in str(error.value) and str(tmp_path / "folder") in str(error.value)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"a": 1, "a": 2}', b"[" * 100_000, b"\xff\xfe", b'{"model": 3}'])
def test_damaged_json_is_refused(data, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "tokenizer.json").write_text(json.dumps(byte_level()))
        (folder / name).write_bytes(data)
        if (name, data) == ("tokenizer_config.json", b'{"model": 3}'):
            continue  # a key that nothing depends on
        with pytest.raises(CheckpointError, match=name):
            load_tokenizer(folder)


def test_a_truncated_or_foreign_sentencepiece_model_is_refused(tmp_path, folders):
    whole = (folders["mistral_v1"] / "tokenizer.model").read_bytes()
    for data in (b"", b"hello", whole[:1000], whole[: len(whole) // 2], whole[1:]):
        (tmp_path / "tokenizer.model").write_bytes(data)
        with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
            load_tokenizer(tmp_path)


def test_half_a_surrogate_pair_is_refused(loaded):
    for name in ("qwen2", "mistral_v3"):
        with pytest.raises(DataError, match="surrogate pair at character 3"):
            loaded[name].encode("abc\ud83d")
        with pytest.raises(DataError, match="surrogate"):
            loaded[name].encode_with_offsets("\ude00")


def test_a_masked_target_is_no_token(loaded):
    with pytest.raises(DataError, match="found -100"):
        loaded["qwen2"].decode([1, -100])
    assert loaded["qwen2"].decode([151_900]) == ""  # a padding row of the embedding
    assert loaded["qwen2"].id_to_token(151_900) is None


WRONG_VALUES = (None, 7, -1, 2**40, 1.5, "x", [], {}, [1], {"a": 1}, True, "\ud800")


def paths(part: object, path: tuple = ()) -> list[tuple]:
    """Every place in a JSON value, but of a vocabulary only the first few."""
    inside = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
    found = [path] if path else []
    for key, value in list(inside)[:10]:
        found += paths(value, (*path, key))
    return found


def test_whatever_stands_anywhere_is_read_or_refused(tmp_path):
    document = byte_level("<s>", "</s>")
    template = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    document["post_processor"] = json.loads(template.__getstate__())
    config = {
        "bos_token": {"content": "<s>"},
        "eos_token": "</s>",
        "added_tokens_decoder": {"256": {"content": "<s>", "special": True}},
        "additional_special_tokens": ["<s>"],
        "chat_template": [{"name": "default", "template": "text"}],
        "add_bos_token": True,
    }
    folder = write(tmp_path / "folder", document, config)
    assert load_tokenizer(folder).encode("a", special_tokens=True) == [256, BYTE_OF_A]
    refused = 0
    for name, whole in (("tokenizer.json", document), ("tokenizer_config.json", config)):
        for path in paths(whole):
            for value in WRONG_VALUES:
                damaged = copy.deepcopy(whole)
                part = damaged
                for key in path[:-1]:
                    part = part[key]
                part[path[-1]] = value
                (folder / name).write_text(json.dumps(damaged))
                try:
                    load_tokenizer(folder).encode("a <s>", special_tokens=True)
                except CheckpointError:
                    refused += 1
        (folder / name).write_text(json.dumps(whole))
    assert refused > 500
