"""Named chat formats: every name, the text that the real models' templates write, and the token that ends an answer."""

import json
from dataclasses import replace
from datetime import datetime

import pytest

from lumen.errors import ConfigError, DataError
from lumen.formats.gguf import read_gguf
from lumen.page import read_format_pages
from lumen.text.chat_format import find_turns, opening, with_default_system, write_jinja
from lumen.text.named_formats import adopt_format, end_of_turn, format_names, load_format, stop_strings
from lumen.text.template import ChatTemplate

NOW = datetime(2024, 7, 26)
PAGES = {page.name: page for page in read_format_pages()}

NAMES = """
transcript|unsloth zephyr chatml mistral llama vicuna vicuna_old|vicuna old alpaca gemma gemma_chatml gemma2
gemma2_chatml
llama-3|llama3 phi-3|phi-35|phi-3.5 llama-3.1|llama-31 qwen-2.5|qwen-25|qwen25|qwen2.5 phi-4 gemma-3|gemma3 qwen-3|qwen3
gemma-3n|gemma3n gpt-oss|gptoss qwen3-instruct qwen3-thinking lfm-2 starling yi-chat gemma-4|gemma4
gemma-4-thinking|gemma4-thinking lfm-2.5
"""


def test_every_name_and_alias_is_known_and_means_one_page():
    wanted = [name for group in NAMES.replace("vicuna old", "vicuna\0old").split() for name in group.split("|")]
    assert {name.replace("\0", " ") for name in wanted} == set(format_names())
    assert sum(1 + len(page.aliases) for page in PAGES.values()) == len(format_names())
    assert all(page.name == name for name, page in PAGES.items())
    with pytest.raises(ConfigError, match=r"no format 'chatmi'\. Did you mean 'chatml'"):
        load_format("chatmi")


def ours(name: str) -> ChatTemplate:
    return ChatTemplate(write_jinja(PAGES[name].chat), "<BOS>", "<EOS>", now=NOW)


def talk(*contents: str, system: str | None = None) -> list[dict]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return messages + [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


# --- against the templates of the models -----------------------------------------------------------------------------

# name → the reference template that writes the same; "training": also a text that ends with an answer; "system": also
# one with a system text; "default": also one without
REFERENCES = {
    "zephyr": ("cjz__zephyr", {"training", "system", "default"}),
    "chatml": ("trl__lfm2", {"training", "system", "default"}),  # which puts BOS before it
    "mistral": ("cjz__mistral-instruct", {"training", "default"}),
    "llama": ("cjz__llama-2-chat", {"training", "system", "default"}),
    "vicuna": ("cjz__vicuna", {"training", "system"}),  # it has no default system text
    "alpaca": ("cjz__alpaca", {"training", "system"}),  # nor has this
    "gemma": ("llamacpp__google-gemma-2-2b-it", {"training", "default"}),
    "gemma_chatml": ("trl__lfm2", {"training", "system", "default"}),
    "gemma-3": ("trl__gemma3", {"training", "system", "default"}),
    "llama-3": ("trl__llama3_training", {"training", "system", "default"}),
    "llama-3.1": ("llamacpp__meta-llama-Llama-3.1-8B-Instruct", {"training", "system", "default"}),
    "phi-3": ("llamacpp__microsoft-Phi-3.5-mini-instruct", {"system", "default"}),  # training: EOS for the last line
    "phi-4": ("axolotl__phi_4", {"training", "system"}),  # its default is that of a reasoning model
    "qwen-2.5": ("llamacpp__Qwen-Qwen2.5-7B-Instruct", {"training", "system", "default"}),
    "qwen-3": ("llamacpp__Qwen-Qwen3-0.6B", {"training", "system", "default"}),
    "gpt-oss": ("llamacpp__openai-gpt-oss-120b", {"training", "system", "default"}),
    "lfm-2": ("trl__lfm2", {"training", "system", "default"}),
}
UNCHECKED = {"transcript", "vicuna_old", "qwen3-instruct", "qwen3-thinking", "lfm-2.5", "starling", "yi-chat"}


def test_every_format_is_checked_or_says_that_it_is_not():
    assert REFERENCES.keys() | UNCHECKED | {"gemma-4", "gemma-4-thinking"} == PAGES.keys()
    assert {name for name, page in PAGES.items() if "no test holds it" in page.source} == UNCHECKED


@pytest.mark.parametrize("name", REFERENCES)
def test_a_format_writes_what_the_models_template_writes(name, shared_data):
    reference, cases = REFERENCES[name]
    source = (shared_data / "chat_templates" / f"{reference}.jinja").read_text()
    if reference.startswith("cjz__"):  # written for people; their README says to take blanks and line ends out
        source = source.replace("    ", "").replace("\n", "")
    theirs, template = ChatTemplate(source, "<BOS>", "<EOS>", now=NOW), ours(name)
    systems = [text for case, text in (("default", None), ("system", "Be brief.\n\nSay no more.")) if case in cases]
    for system in systems:
        for words in (["One?"], ["Zürich?\n\n世界", "It's {{ 1 }}.", "two\n"], ["a", "b", "c", "d", "e"]):
            messages = talk(*words, system=system)
            wanted = theirs.render(messages, add_generation_prompt=True)
            assert template.render(messages, add_generation_prompt=True) == wanted.removeprefix(
                "<BOS>" if name == "chatml" else ""
            )
            if "training" in cases:
                messages = talk(*words, "the end", system=system)
                wanted = theirs.render(messages).removeprefix("<BOS>" if name == "chatml" else "")
                assert template.render(messages) == wanted


def test_qwen_3_writes_thoughts_as_the_models_template_does(shared_data):
    theirs = ChatTemplate((shared_data / "chat_templates/llamacpp__Qwen-Qwen3-0.6B.jinja").read_text())
    for last in ("<think>\nadd\n</think>\n\n4", "\n4", "<think></think>4", "no thoughts"):
        messages = talk("1+1?", "<think>\nadd\n</think>\n\n2", "2+2?", last)
        assert ours("qwen-3").render(messages) == theirs.render(messages)
        assert ours("qwen-3").render(messages[:3], add_generation_prompt=True) == theirs.render(
            messages[:3], add_generation_prompt=True
        )
    messages = [*talk("2+2?"), {"role": "assistant", "content": "4", "reasoning_content": "add"}]
    assert ours("qwen-3").render(messages) == theirs.render(messages)


@pytest.mark.parametrize("thinking", [False, True])
def test_gemma_4_writes_what_the_models_template_writes(thinking, shared_data):
    source = read_gguf(shared_data / "vocab/ggml-vocab-gemma-4.gguf").metadata["tokenizer.chat_template"].data
    theirs = ChatTemplate(source, "<BOS>", "<EOS>")
    template = ours("gemma-4-thinking" if thinking else "gemma-4")
    for system in (None, "Be brief."):
        for words in (["One?"], [" two ", "<|channel>thought\nwell\n<channel|>2", "three\n"]):
            messages = talk(*words, system=system)
            wanted = theirs.render(messages, add_generation_prompt=True, enable_thinking=thinking)
            assert template.render(messages, add_generation_prompt=True) == wanted


@pytest.mark.parametrize("name", ["qwen3-thinking", "gemma-4", "gemma-4-thinking", "qwen-3"])
def test_a_format_that_thinks_opens_the_last_answer_as_its_prompt_does(name):
    prompt = ours(name).render(talk("One?"), add_generation_prompt=True)
    assert ours(name).render(talk("One?", "1")).startswith(prompt)


# --- as turns --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAGES)
def test_the_turns_of_the_page_are_found_in_the_template_made_from_it(name):
    chat = PAGES[name].chat
    filled = {"{bos}": "<BOS>", "{eos}": "<EOS>", "{today}": "2024-07-26"}

    def fill(text: str) -> str:
        for place, token in filled.items():
            text = text.replace(place, token)
        return text

    turns = find_turns(ours(name))
    assert turns.user == tuple(map(fill, chat.user)) and turns.assistant == tuple(map(fill, chat.assistant))
    assert turns.prompt == fill(opening(chat)) and turns.begin == fill(chat.begin)
    assert turns.system == (tuple(map(fill, chat.system)) if chat.system else None)
    assert turns.default_system == chat.default_system and turns.system_in_user == chat.system_in_user
    assert bool(turns.trim) == chat.trim


def test_what_a_format_has_no_turn_for_is_refused():
    with pytest.raises(DataError, match="no turn for the role tool"):
        ours("chatml").render([{"role": "tool", "content": "42"}])
    with pytest.raises(DataError, match="no turn for the role system"):
        ours("gemma").render(talk("One?", system="Be brief."))
    with pytest.raises(DataError, match="a system text stands first or nowhere"):
        ours("gemma-3").render([*talk("One?"), {"role": "system", "content": "late"}])


def test_a_default_system_text_may_open_the_first_question():
    page = replace(PAGES["gemma-3"].chat, default_system="Be brief.")
    template = ChatTemplate(write_jinja(page), "<BOS>", "<EOS>")
    assert template.render(talk("One?")) == ours("gemma-3").render(talk("One?", system="Be brief."))
    assert find_turns(template).default_system == "Be brief."


def test_a_runs_system_text_is_that_of_conversations_without_one():
    for name in ("chatml", "gemma-3", "qwen-2.5", "llama", "mistral", "llama-3.1", "vicuna"):
        plain, given = ours(name), ChatTemplate(with_default_system(ours(name).source, 'Say "{%".'), "<BOS>", "<EOS>")
        assert given.render(talk("One?")) == plain.render(talk("One?", system='Say "{%".'))
        assert given.render(talk("One?", system="No.")) == plain.render(talk("One?", system="No."))
        turns = find_turns(given)
        assert turns.default_system == 'Say "{%".' and turns.system == find_turns(plain).system
        assert turns.write(talk("One?")) == given.render(talk("One?"), add_generation_prompt=True)


# --- on a tokenizer --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stories(shared_data):
    from lumen.text.tokenizer import load_tokenizer

    return load_tokenizer(shared_data / "models/stories260K")


@pytest.fixture(scope="module")
def demo():
    from lumen.demo import demo_folder
    from lumen.text.tokenizer import load_tokenizer

    return load_tokenizer(demo_folder("lumen-demo"))


def test_a_token_of_the_vocabulary_is_preferred_and_becomes_eos(demo, tmp_path):
    tokenizer, note = adopt_format(demo, load_format("llama-3"))
    assert tokenizer.id_to_token(tokenizer.eos_id) == "<|eot_id|>" and "a token of the vocabulary" in note
    assert set(tokenizer.stop_ids) == set(demo.stop_ids) and tokenizer.stop_ids[0] == tokenizer.eos_id
    assert stop_strings(load_format("llama3"), tokenizer) == ["<|eot_id|>", "<|end_of_text|>"]
    tokenizer.save(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == "<|eot_id|>"
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == list(tokenizer.stop_ids)


def test_a_format_that_ends_with_eos_keeps_the_models_own(demo, stories):
    for tokenizer in (demo, stories):
        for name in ("zephyr", "alpaca", "vicuna", "llama", "mistral", "unsloth"):
            adopted, note = adopt_format(tokenizer, load_format(name))
            assert adopted.eos_id == tokenizer.eos_id and "as the format has it" in note
            assert adopted.id_to_token(adopted.eos_id) in stop_strings(load_format(name), adopted)


def test_eos_takes_the_place_of_an_end_that_is_no_token(demo, stories):
    for tokenizer, eos in ((demo, "<|eot_id|>"), (stories, "</s>")):
        eos = tokenizer.id_to_token(tokenizer.eos_id)
        adopted, note = adopt_format(tokenizer, load_format("chatml"))
        assert adopted.eos_id == tokenizer.eos_id and "stands in the place of '<|im_end|>'" in note
        bos = tokenizer.id_to_token(tokenizer.bos_id)
        text = ChatTemplate(adopted.chat_template, bos, eos).render(talk("One?", "1"))
        assert text == f"{bos}<|im_start|>user\nOne?{eos}\n<|im_start|>assistant\n1{eos}\n"
        assert stop_strings(load_format("chatml"), adopted)[0] == eos


def test_a_format_that_cannot_end_is_refused_with_the_ways_out(stories):
    with pytest.raises(
        ConfigError, match=r"'llama-3' ends a turn with '<\|eot_id\|>'.*Add the format's tokens.*chatml, gemma"
    ):
        adopt_format(stories, load_format("llama-3"))


def test_every_format_has_an_end(stories):
    assert all(end_of_turn(page.chat) for page in PAGES.values())
