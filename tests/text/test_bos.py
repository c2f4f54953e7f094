"""One BOS, wherever template or tokenizer asks for one, and never two: every template with every tokenizer."""

import json
import re
import shutil
from datetime import datetime
from pathlib import Path

import pytest
import transformers

from lumen.errors import DataError
from lumen.formats.gguf import read_gguf
from lumen.text.named_formats import adopt_format, format_names, load_format
from lumen.text.template import ChatTemplate
from lumen.text.tokenizer import Tokenizer, load_tokenizer
from lumen.text.tokenizer_files import BYTE_OF, TokenKind
from lumen.text.turns import chat_template, prompt_ids

NOW = datetime(2024, 7, 26)
MISTRAL = {
    "mistral_v1": "tokenizer.model.v1",
    "mistral_v2": "mistral_instruct_tokenizer_240216.model.v2",
    "mistral_v3": "mistral_instruct_tokenizer_240323.model.v3",
    "mistral_v7": "mistral_instruct_tokenizer_241114.model.v7",
}
# vocabularies of llama.cpp → whether it puts BOS before a text, which the file or the kind of the vocabulary says
VOCABULARIES = {
    **{"llama-spm": True, "llama-bpe": True, "qwen2": False, "qwen35": False, "gemma-4": True, "phi-3": True},
    "gpt-2": False,
}
TOKENIZERS = ["stories260K", "qwen2-folder", *MISTRAL, *VOCABULARIES]


@pytest.fixture(scope="module")
def tokenizers(shared_data, tmp_path_factory):
    """`tokenizers(name)`: the tokenizer, with its own way of beginning a text."""
    root, found = tmp_path_factory.mktemp("tokenizers"), {}

    def load(name: str) -> Tokenizer:
        if name not in found:
            found[name] = load_tokenizer(make(name))
        return found[name]

    def make(name: str) -> Path:
        folder = root / name
        if name == "stories260K":
            return shared_data / "models/stories260K"
        if name == "qwen2-folder":
            transformers.AutoTokenizer.from_pretrained(shared_data / "tokenizers/qwen2").save_pretrained(folder)
        elif name in MISTRAL:
            folder.mkdir()
            shutil.copy(shared_data / "tokenizers/mistral" / MISTRAL[name], folder / "tokenizer.model")
        else:
            write_special_tokens(folder, shared_data / f"vocab/ggml-vocab-{name}.gguf", VOCABULARIES[name])
        return folder

    return load


def write_special_tokens(folder: Path, vocabulary: Path, add_bos: bool) -> None:
    """A byte-level tokenizer with the special tokens of a real vocabulary and its way of beginning a text.

    Its ordinary tokens are single bytes: what is cut between special tokens does not matter here.
    """
    folder.mkdir()
    values = {key.removeprefix("tokenizer.ggml."): v.data for key, v in read_gguf(vocabulary).metadata.items()}
    kinds = (TokenKind.CONTROL, TokenKind.UNKNOWN, TokenKind.USER)
    named = zip(values["tokens"], values["token_type"], strict=True)
    special = [text for text, kind in named if kind in kinds and not re.fullmatch(r"\[PAD\d+\]|[▁\s]+", text)]
    bytes_of = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": 256 + number, "content": text, "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            for number, text in enumerate(special)
        ],
        "normalizer": None,
        "pre_tokenizer": bytes_of,
        "post_processor": None,
        "decoder": bytes_of,
        "model": {"type": "BPE", "vocab": {letter: id for id, letter in enumerate(BYTE_OF)}, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(document))
    names = {f"{key}_token": values["tokens"][values[f"{key}_token_id"]] for key in ("bos", "eos")}
    if not add_bos:
        names["bos_token"] = None
    (folder / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": add_bos, **names}))


def conversations(shared_data: Path) -> list[dict]:
    """Arguments of renderings: with a system text, in parts, with tools, of one turn and of several."""
    cases = json.loads((shared_data / "chat_templates/inputs.json").read_text())
    parts = [{"role": "user", "content": [{"type": "text", "text": "One?"}]}]
    talk = [{"role": r, "content": c} for r, c in (("user", "One?"), ("assistant", "1"), ("user", "Two?"))]
    return [
        {"messages": talk},
        {"messages": [{"role": "system", "content": "Be brief."}, *talk]},
        {"messages": parts},
        {"messages": talk, "tools": cases["tools_roundtrip"]["tools"]},
    ]


def begins(text: str, bos: str) -> bool:
    return text.lstrip().startswith(bos)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_prompt_has_one_bos_where_one_is_asked_for_and_never_two(name, shared_data, tokenizers):
    tokenizer = tokenizers(name)
    bos = "" if tokenizer.bos_id is None else tokenizer.id_to_token(tokenizer.bos_id)
    eos = tokenizer.id_to_token(tokenizer.eos_id)
    asked_by = {"template": 0, "tokenizer": 0, "both": 0, "none": 0}
    for path in sorted((shared_data / "chat_templates").glob("*.jinja")):
        template, rendered = ChatTemplate(path.read_text(), bos, eos, now=NOW), 0
        for case in conversations(shared_data):
            try:
                text = template.render(**case, add_generation_prompt=True)
            except DataError:
                continue
            try:
                ids = prompt_ids(case["messages"], tokenizer, template, case.get("tools"))
            except DataError as refusal:  # this tokenizer lacks the template's tokens, and joins prompt and answer
                assert "share a token" in str(refusal) and case["messages"][1:], path.name
                continue
            rendered += 1
            if not bos:
                assert tokenizer.decode(ids) == tokenizer.decode(tokenizer.encode(text)), path.name
                continue
            written, wanted = begins(text, bos), tokenizer.add_bos
            asked_by[("both" if written else "tokenizer") if wanted else ("template" if written else "none")] += 1
            assert ids.count(tokenizer.bos_id) == text.count(bos) + (wanted and not written), path.name
            place = ids.index(tokenizer.bos_id) if tokenizer.bos_id in ids else None
            if written or wanted:
                assert not tokenizer.decode(ids[:place]).strip(), path.name
                assert ids[place + 1] != tokenizer.bos_id, path.name
        assert rendered, path.name
    assert not bos or (asked_by["both"] >= 35 and asked_by["tokenizer"] >= 35) or not tokenizer.add_bos, asked_by


@pytest.mark.parametrize("name", ["stories260K", "qwen2-folder", "llama-bpe"])
def test_a_named_format_writes_the_bos_that_the_tokenizer_asks_for(name, tokenizers):
    tokenizer = tokenizers(name)
    for format in set(format_names().values()):
        page = load_format(format)
        if not page.eos_may_end_turns:
            continue
        adopted, _ = adopt_format(tokenizer, page)
        template = chat_template(adopted)
        text = template.render([{"role": "user", "content": "One?"}], add_generation_prompt=True)
        ids = adopted.encode(text)
        assert ids == prompt_ids([{"role": "user", "content": "One?"}], adopted, template)
        assert ids.count(adopted.bos_id) == (0 if adopted.bos_id is None else 1)
        assert adopted.bos_id is None or ids[0] == adopted.bos_id
