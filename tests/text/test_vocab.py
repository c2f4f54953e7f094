"""The vocabulary of a GGUF file: upstream's own files rebuilt, and llama.cpp cutting text with what we write."""

import hashlib
import json
import re
import shutil
import unicodedata
from pathlib import Path

import pytest
import tokenizers
import transformers
from llama_cpp import LlamaCpp

from lumen.errors import ExportError
from lumen.formats.gguf import Value, read_gguf, write_gguf_file
from lumen.text.tokenizer import Tokenizer, load_tokenizer
from lumen.text.tokenizer_files import BYTE_OF, TokenKind
from lumen.text.vocab import PRE_OF_REGEX, GGUFVocab, gguf_vocab

DEMO = Path(__file__).resolve().parent.parent.parent / "lumen/demo/base"
REGEX_OF = {pre: regex for regex, pre in PRE_OF_REGEX.items()}
UPSTREAM = {  # vocabulary: (pre, BOS is added)
    "gpt-2": ("gpt-2", False),
    "llama-bpe": ("llama-bpe", True),
    "qwen2": ("qwen2", False),
    "qwen35": ("qwen35", False),
    "llama-spm": ("default", True),
}
# sha256 of the ids of upstream's probe text, by which llama.cpp's converter tells the rules apart.
PROBE_HASH = {
    "llama-bpe": "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5",
    "qwen2": "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea",
    "gpt-2": "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454",
}


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def split(pre: str) -> dict | None:
    byte_level = BYTE_LEVEL | {"use_regex": pre == "gpt-2"}
    if pre == "gpt-2":
        return byte_level
    rule = {"type": "Split", "pattern": {"Regex": REGEX_OF[pre]}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [rule, byte_level]}


def document(pre: str, vocab: dict[str, int], merges: list, added: list[dict], **model: object) -> dict:
    """A tokenizer.json of either kind: byte-level with the rule `pre`, or SentencePiece for "default"."""
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    as_text = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    prepare = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, spaces]}
    say = {"type": "Sequence", "decoders": [as_text, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]}
    spm = pre == "default"
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "added_tokens": [flags | token for token in added],
        "normalizer": prepare if spm else None,
        "pre_tokenizer": None if spm else split(pre),
        "post_processor": None,
        "decoder": say if spm else BYTE_LEVEL,
        "model": {"type": "BPE", "byte_fallback": spm, "vocab": vocab, "merges": merges} | model,
    }


def write(folder: Path, document: dict, config: dict) -> Path:
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def upstreams_texts(shared_data: Path, name: str) -> list[str]:
    data = (shared_data / f"vocab/ggml-vocab-{name}.gguf.inp").read_bytes()
    return data.decode().split("\n__ggml_vocab_test__\n")


def merges_by_score(tokens: tuple[str, ...], scores: tuple[float, ...], kinds: tuple[int, ...]) -> list[list[str]]:
    """Every way to make a piece of two others, the best piece first: how SentencePiece models are converted."""
    words = {text: id for id, text in enumerate(tokens) if kinds[id] == TokenKind.NORMAL}
    pairs = []
    for text, id in words.items():
        ways = [(text[:at], text[at:]) for at in range(1, len(text)) if text[:at] in words and text[at:] in words]
        ways.sort(key=lambda way: (words[way[0]], words[way[1]]))
        pairs += [(-scores[id], list(way)) for way in ways]
    return [pair for _, pair in sorted(pairs, key=lambda entry: entry[0])]


@pytest.fixture(scope="module")
def upstream(shared_data: Path):
    """Metadata of one of upstream's vocabulary files, without its prefix."""
    found: dict[str, dict] = {}

    def read(name: str) -> dict:
        if name not in found:
            metadata = read_gguf(shared_data / f"vocab/ggml-vocab-{name}.gguf").metadata
            found[name] = {key.removeprefix("tokenizer.ggml."): value.data for key, value in metadata.items()}
        return found[name]

    return read


@pytest.fixture(scope="module")
def rebuilt(upstream, tmp_path_factory: pytest.TempPathFactory):
    """A tokenizer for one of upstream's files, through a tokenizer.json made from what the file says."""
    found: dict[str, Tokenizer] = {}
    root = tmp_path_factory.mktemp("rebuilt")

    def load(name: str) -> Tokenizer:
        if name not in found:
            found[name] = load_tokenizer(folder_of(root / name, upstream(name), *UPSTREAM[name]))
        return found[name]

    return load


def folder_of(folder: Path, values: dict, pre: str, add_bos: bool) -> Path:
    tokens, kinds = values["tokens"], values["token_type"]
    special = {TokenKind.CONTROL, TokenKind.UNKNOWN}
    apart = {id for id in range(len(tokens)) if kinds[id] in special | {TokenKind.USER, TokenKind.UNUSED}}
    real = {id for id in apart if not re.fullmatch(r"\[PAD\d+\]", tokens[id])}
    spm = pre == "default"
    vocab = {text: id for id, text in enumerate(tokens) if id not in apart or (spm and kinds[id] in special)}
    added = [{"id": id, "content": tokens[id], "special": kinds[id] in special} for id in sorted(real)]
    model = {"ignore_merges": pre == "llama-bpe", "unk_token": tokens[0] if spm else None}
    merges = merges_by_score(tokens, values["scores"], kinds) if spm else values["merges"]
    config = {"add_bos_token": add_bos}
    config |= {f"{key}_token": tokens[values[f"{key}_token_id"]] for key in ("bos", "eos")}
    return write(folder, document(pre, vocab, merges, added, **model), config)


def gguf(path: Path, vocab: GGUFVocab) -> Path:
    """A file with this vocabulary and nothing else."""
    numbers = {
        "bos_token_id": vocab.bos_id,
        "eos_token_id": vocab.eos_id,
        "unknown_token_id": vocab.unk_id,
        "padding_token_id": vocab.pad_id,
        "eot_token_id": vocab.eot_id,
    }
    values = {key: Value("u32", number) for key, number in numbers.items() if number is not None} | {
        "model": Value("string", vocab.model),
        "pre": Value("string", vocab.pre),
        "tokens": Value("string[]", vocab.tokens),
        "token_type": Value("i32[]", vocab.token_types),
        "add_bos_token": Value("bool", vocab.add_bos),
        "add_eos_token": Value("bool", vocab.add_eos),
        "add_space_prefix": Value("bool", vocab.add_space_prefix),
    }
    if vocab.scores is not None:
        values["scores"] = Value("f32[]", vocab.scores)
    if vocab.merges is not None:
        values["merges"] = Value("string[]", vocab.merges)
    metadata = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    sizes = {"block_count": 1, "context_length": 8, "embedding_length": 8, "feed_forward_length": 8}
    sizes |= {"attention.head_count": 1}
    metadata |= {f"llama.{key}": Value("u32", size) for key, size in sizes.items()}
    metadata |= {"llama.attention.layer_norm_rms_epsilon": Value("f32", 1e-5)}
    write_gguf_file(path, {"general.architecture": Value("string", "llama")} | metadata, [])
    return path


# --- upstream's own files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", UPSTREAM)
def test_ids_equal_upstreams_test_cases(name, rebuilt, shared_data):
    texts = upstreams_texts(shared_data, name)
    wanted = (shared_data / f"vocab/ggml-vocab-{name}.gguf.out").read_text().split("\n")
    assert len(texts) == len(wanted) >= 47
    for text, line in zip(texts, wanted, strict=True):
        assert rebuilt(name).encode(text) == [int(id) for id in line.split()], text


@pytest.mark.parametrize("name", UPSTREAM)
def test_the_written_vocabulary_equals_upstreams(name, rebuilt, upstream):
    values = upstream(name)
    vocab = gguf_vocab(rebuilt(name), rows=len(values["tokens"]))
    assert (vocab.pre, vocab.add_bos, vocab.add_eos) == (*UPSTREAM[name], False)
    assert vocab.model == values["model"] and vocab.tokens == values["tokens"]
    padding = set(range(rebuilt(name).size, len(values["tokens"])))  # upstream's old files have them user-defined
    assert all(vocab.token_types[id] == (5 if id in padding else kind) for id, kind in enumerate(values["token_type"]))
    assert vocab.eos_id == values["eos_token_id"]
    if vocab.model == "gpt2":
        assert vocab.merges == values["merges"] and vocab.scores is None
        return
    assert vocab.merges is None and vocab.add_space_prefix
    made = [id for id, score in enumerate(vocab.scores) if vocab.token_types[id] == 1 and score > -1e9]
    assert len(made) > 25_000
    made.sort(key=lambda id: -vocab.scores[id])
    assert [values["scores"][id] for id in made] == sorted((values["scores"][id] for id in made), reverse=True)


@pytest.mark.parametrize("name", PROBE_HASH)
def test_the_probe_text_has_upstreams_hash(name, rebuilt, shared_data):
    texts = upstreams_texts(shared_data, name)
    probe = max(texts, key=len)
    ids = rebuilt(name).encode(probe, special_tokens=True)
    assert hashlib.sha256(str(ids).encode()).hexdigest() == PROBE_HASH[name]


# --- llama.cpp -------------------------------------------------------------------------------------------------------

MISTRAL = (
    "tokenizer.model.v1",
    "mistral_instruct_tokenizer_240216.model.v2",
    "mistral_instruct_tokenizer_240323.model.v3",
    "mistral_instruct_tokenizer_241114.model.v7",
)


@pytest.fixture(scope="module")
def texts(shared_data: Path) -> list[str]:
    lines = (shared_data / "tokenizers/goldens.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines] + upstreams_texts(shared_data, "llama-bpe")


def check_in_llama_cpp(tokenizer: Tokenizer, path: Path, texts: list[str], rows: int | None = None) -> GGUFVocab:
    """Holds llama.cpp's ids, pieces, kinds and ends against the tokenizer's."""
    vocab = gguf_vocab(tokenizer, rows or tokenizer.size)
    with LlamaCpp(gguf(path, vocab), vocab_only=True) as llama:
        assert llama.rows == len(vocab.tokens)
        for text in texts:
            assert llama.tokenize(text, parse_special=True) == tokenizer.encode(text), text
            around = llama.tokenize(text, add_special=True, parse_special=True)
            assert around == tokenizer.encode(text, special_tokens=True), text
        assert all(llama.is_eog(id) for id in tokenizer.stop_ids)
        assert all(llama.is_control(id) for id in tokenizer.special_ids if id != tokenizer.unk_id)
        for id in range(0, tokenizer.size, 97):
            assert llama.piece(id) == tokenizer.bytes_of(id), id
    return vocab


@pytest.mark.parametrize("file", MISTRAL)
def test_llama_cpp_agrees_on_sentencepiece_models(file, texts, shared_data, tmp_path):
    shutil.copy(shared_data / "tokenizers/mistral" / file, tmp_path / "tokenizer.model")
    vocab = check_in_llama_cpp(load_tokenizer(tmp_path), tmp_path / "vocab.gguf", texts)
    assert (vocab.bos_id, vocab.eos_id, vocab.unk_id, vocab.pad_id, vocab.eot_id) == (1, 2, 0, None, None)


@pytest.mark.parametrize("name", ["llama-spm", "llama-bpe", "gpt-2"])
def test_llama_cpp_agrees_on_rebuilt_vocabularies(name, rebuilt, texts, tmp_path):
    vocab = check_in_llama_cpp(rebuilt(name), tmp_path / "vocab.gguf", texts, rows=rebuilt(name).size + 64)
    assert vocab.differences == ()
    assert vocab.tokens[-1] == f"[PAD{len(vocab.tokens) - 1}]" and vocab.token_types[-64:] == (TokenKind.UNUSED,) * 64


def test_llama_cpp_agrees_on_qwen2(texts, shared_data, tmp_path):
    transformers.AutoTokenizer.from_pretrained(shared_data / "tokenizers/qwen2").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    normal = [text for text in texts if unicodedata.is_normalized("NFC", text)]
    assert len(normal) > 140
    vocab = check_in_llama_cpp(tokenizer, tmp_path / "vocab.gguf", normal, rows=151_936)
    assert (vocab.eos_id, vocab.pad_id, vocab.add_bos) == (151_645, 151_643, False)
    assert vocab.differences == ("Text that is not in Unicode's form NFC: llama.cpp does not bring it there.",)


def test_llama_cpp_agrees_on_the_demo(texts, tmp_path):
    assert check_in_llama_cpp(load_tokenizer(DEMO), tmp_path / "vocab.gguf", texts).differences == ()


def test_llama_cpp_agrees_on_stories_but_for_the_blanks_it_keeps(texts, shared_data, tmp_path):
    tidy = [text for text in texts if not re.search(r"^ | $|  |^$", text)]
    assert len(tidy) > 60
    stories = shared_data / "models/stories260K"
    shutil.copy(stories / "tokenizer.model", tmp_path)
    scores = []
    for folder in (stories, tmp_path):
        vocab = check_in_llama_cpp(load_tokenizer(folder), tmp_path / "vocab.gguf", tidy)
        assert len(vocab.differences) == 1 and "Runs of blanks" in vocab.differences[0]
        scores.append(vocab.scores)
    assert scores[0] == scores[1]  # the tokenizer.model beside tokenizer.json is believed


def test_scores_rebuilt_from_merges_cut_like_the_true_ones(texts, shared_data, tmp_path):
    stories = shared_data / "models/stories260K"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(stories / name, tmp_path)
    tidy = [text for text in texts if not re.search(r"^ | $|  |^$", text)]
    vocab = check_in_llama_cpp(load_tokenizer(tmp_path), tmp_path / "vocab.gguf", tidy)
    assert vocab.scores != gguf_vocab(load_tokenizer(stories), 512).scores


# --- rules by hand ---------------------------------------------------------------------------------------------------


def tiny(
    folder: Path, *added: tuple[str, bool], pre: str = "llama-bpe", config: dict | None = None, **changes: object
) -> Tokenizer:
    """256 bytes, one merge, and the (text, special) tokens from id 257 on, the first of them EOS."""
    vocab = {text: id for id, text in enumerate(sorted(BYTE_OF))} | {"th": 256}
    tokens = [{"id": 257 + at, "content": text, "special": special} for at, (text, special) in enumerate(added)]
    made = document(pre, vocab, [["t", "h"]], tokens, ignore_merges=pre in ("llama-bpe", "tekken")) | changes
    return load_tokenizer(write(folder, made, {"eos_token": added[0][0]} if config is None else config))


def test_added_tokens_have_the_kinds_of_llama_cpps_converter(tmp_path):
    added = [("<eos>", True), ("<|fim_pad|>", False), ("<tool_call>", False), ("two words", False)]
    vocab = gguf_vocab(tiny(tmp_path / "a", *added), rows=263)
    control, user, unused = TokenKind.CONTROL, TokenKind.USER, TokenKind.UNUSED
    assert vocab.tokens[256:] == ("th", "<eos>", "<|fim_pad|>", "<tool_call>", "two words", "[PAD261]", "[PAD262]")
    assert vocab.token_types[256:] == (TokenKind.NORMAL, control, control, user, user, unused, unused)


def test_both_ways_of_writing_merges_give_the_same(tmp_path):
    as_lists = tiny(tmp_path / "a", ("<eos>", True))
    document = json.loads((tmp_path / "a/tokenizer.json").read_text())
    document["model"]["merges"] = ["t h"]
    as_texts = load_tokenizer(write(tmp_path / "b", document, {"eos_token": "<eos>"}))
    assert gguf_vocab(as_lists, 258).merges == gguf_vocab(as_texts, 258).merges == ("t h",)


def test_ends_of_turns_are_found_and_the_custom_one_is_named(tmp_path):
    added = [("<|eos|>", True), ("<|eom_id|>", True), ("<|eot_id|>", True), ("<turn>", True), ("<stop>", True)]
    vocab = gguf_vocab(tiny(tmp_path / "a", *added), 262)
    assert (vocab.eos_id, vocab.eot_id, vocab.differences) == (257, 259, ())
    (tmp_path / "a/generation_config.json").write_text('{"eos_token_id": [257, 260]}')
    assert gguf_vocab(load_tokenizer(tmp_path / "a"), 262).eot_id == 260  # <|eot_id|> is known by its text
    (tmp_path / "a/generation_config.json").write_text('{"eos_token_id": [260, 261]}')
    vocab = gguf_vocab(load_tokenizer(tmp_path / "a"), 262)
    assert vocab.eot_id == 260 and "'<stop>' goes on" in vocab.differences[0]


def test_a_tokenizer_without_bos_names_eos_for_it(tmp_path):
    vocab = gguf_vocab(tiny(tmp_path / "a", ("<eos>", True)), 258)
    assert (vocab.bos_id, vocab.eos_id, vocab.add_bos) == (257, 257, False)
    with pytest.raises(ExportError, match="No token ends an answer"):
        gguf_vocab(tiny(tmp_path / "b", ("<eos>", True), config={}), 258)


@pytest.mark.parametrize("pre", [*REGEX_OF, "gpt-2"])
def test_the_rule_for_words_is_found_by_its_expression(pre, tmp_path):
    assert gguf_vocab(tiny(tmp_path / "a", ("<eos>", True), pre=pre), 258).pre == pre


def test_the_rule_of_smollm_is_found(tmp_path):
    digits = {"type": "Digits", "individual_digits": True}
    steps = sequence(digits, BYTE_LEVEL | {"use_regex": True})
    assert gguf_vocab(tiny(tmp_path / "a", ("<eos>", True), pre="gpt-2", pre_tokenizer=steps), 258).pre == "smollm"


def sequence(*steps: dict) -> dict:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def rule(regex: str, behavior: str = "Isolated", invert: bool = False) -> dict:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert}


UNKNOWN_RULES = {
    "another expression": sequence(rule(REGEX_OF["llama-bpe"].replace("{1,3}", "{1,4}")), BYTE_LEVEL),
    "separators removed": sequence(rule(REGEX_OF["llama-bpe"], behavior="Removed"), BYTE_LEVEL),
    "the expression inverted": sequence(rule(REGEX_OF["llama-bpe"], invert=True), BYTE_LEVEL),
    "two expressions": sequence(rule(REGEX_OF["llama-bpe"]), rule(REGEX_OF["qwen2"]), BYTE_LEVEL),
    "the expression and GPT-2's": sequence(rule(REGEX_OF["qwen2"]), BYTE_LEVEL | {"use_regex": True}),
    "a space before the text": BYTE_LEVEL | {"use_regex": True, "add_prefix_space": True},
    "no rule": None,
}


@pytest.mark.parametrize("name", UNKNOWN_RULES)
def test_an_unknown_rule_for_words_is_refused(name, tmp_path):
    tokenizer = tiny(tmp_path / "a", ("<eos>", True), pre_tokenizer=UNKNOWN_RULES[name])
    with pytest.raises(ExportError, match=r"pre_tokenizer: llama\.cpp has no rule"):
        gguf_vocab(tokenizer, 258)


def test_a_tokenizer_that_llama_cpp_cannot_follow_is_refused(tmp_path):
    lower = tiny(tmp_path / "a", ("<eos>", True), normalizer={"type": "Lowercase"})
    with pytest.raises(ExportError, match=r"normalizer: .*Lowercase"):
        gguf_vocab(lower, 258)
    template = tokenizers.processors.TemplateProcessing(
        single="<a> <b> $A", special_tokens=[("<a>", 257), ("<b>", 258)]
    )
    names = {"bos_token": "<a>", "eos_token": "<b>"}
    around = json.loads(template.__getstate__())
    both = tiny(tmp_path / "b", ("<a>", True), ("<b>", True), post_processor=around, config=names)
    with pytest.raises(ExportError, match=r"puts \(257, 258\) before"):
        gguf_vocab(both, 259)
    with pytest.raises(ExportError, match="has 259 ids, the embedding 258 rows"):
        gguf_vocab(both, 258)
    with pytest.raises(ExportError, match=r"both written '\[PAD259\]'"):
        gguf_vocab(tiny(tmp_path / "c", ("<eos>", True), ("[PAD259]", False)), 260)


def test_a_difference_is_told(tmp_path):
    strict = tiny(tmp_path / "a", ("<eos>", True), pre="qwen2", normalizer={"type": "NFC"})
    assert "form NFC" in gguf_vocab(strict, 258).differences[0]
    document = json.loads((tmp_path / "a/tokenizer.json").read_text())
    document["model"]["ignore_merges"] = True
    document["added_tokens"][0] |= {"lstrip": True, "single_word": True}
    told = gguf_vocab(load_tokenizer(write(tmp_path / "b", document, {"eos_token": "<eos>"})), 258).differences
    assert [sentence.split(":")[0] for sentence in told] == [
        "Blanks beside '<eos>'",
        "'<eos>' inside a word",
        "Text that is not in Unicode's form NFC",
        "A word that is a token which no merges make",
    ]


def sentencepiece_like(folder: Path, bytes_: int = 256, **changes: object) -> Tokenizer:
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(bytes_)}
    vocab |= {text: len(vocab) + at for at, text in enumerate(["▁", "a", "b", "▁a", "ab", "▁ab", "never"])}
    added = [{"id": id, "content": text, "special": True} for text, id in vocab.items() if id < 3]
    added.append({"id": len(vocab), "content": "▁▁x", "special": False})
    merges = [["▁", "a"], ["a", "b"], ["▁", "ab"], ["▁a", "b"]]
    made = document("default", vocab, merges, added, unk_token="<unk>") | changes
    return load_tokenizer(write(folder, made, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}))


def test_scores_are_the_negated_ranks_of_the_first_merges(tmp_path):
    vocab = gguf_vocab(sentencepiece_like(tmp_path / "a"), 268)
    assert (vocab.model, vocab.pre, vocab.merges, vocab.add_space_prefix) == ("llama", "default", None, True)
    assert vocab.scores[:259] == (0.0,) * 259
    assert vocab.scores[259:] == (-1e9, -1e9, -1e9, 0.0, -1.0, -2.0, -1e9, -1000.0, -10000.0)
    assert vocab.tokens[266:] == ("  x", "[PAD267]")
    assert vocab.token_types[:4] == (2, 3, 3, 6) and vocab.token_types[265:] == (1, 4, 5)


def test_where_a_text_gets_a_space_is_read(tmp_path):
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    gemma = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    vocab = gguf_vocab(sentencepiece_like(tmp_path / "a", normalizer=spaces, pre_tokenizer=gemma), 267)
    assert (vocab.add_space_prefix, vocab.differences) == (False, ())
    for scheme, prefix, told in (("always", True, 0), ("first", True, 1), ("never", False, 0)):
        step = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
        vocab = gguf_vocab(sentencepiece_like(tmp_path / scheme, normalizer=None, pre_tokenizer=step), 267)
        assert (vocab.add_space_prefix, len(vocab.differences)) == (prefix, told)


def test_a_sentencepiece_vocabulary_without_all_bytes_is_refused(tmp_path):
    with pytest.raises(ExportError, match=r"no token for 1 of the 256 bytes, the first is <0xFF>"):
        gguf_vocab(sentencepiece_like(tmp_path / "a", bytes_=255), 267)
