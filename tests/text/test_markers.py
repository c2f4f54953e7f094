"""Markers by hand: what lies between them is learned, to the token, also with templates whose turns cannot be found."""

import json
import random
from datetime import datetime
from pathlib import Path

import pytest

from lumen.demo import demo_folder
from lumen.errors import ConfigError, DataError
from lumen.text.conversation import Conversation, Encoded, Text, Turn
from lumen.text.markers import Markers, encode_by_markers
from lumen.text.template import ChatTemplate
from lumen.text.tokenizer import Tokenizer, load_tokenizer

NOW = datetime(2024, 7, 26)

# For the templates in which the answers cannot be found: their markers, what is learned of "It is 1." and "It is 2."
HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
REFUSED = {
    "cjz__alpaca": ("### Instruction:\n", "### Response:\n", "</s>"),
    "cjz__chatml": ("<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>"),
    "cjz__falcon-instruct": ("\n\nUser: ", "\n\nAssistant: ", ""),
    "cjz__llama-3-instruct": (HEADER.format("user"), HEADER.format("assistant"), "<|eot_id|>"),
    "cjz__vicuna": ("USER: ", "ASSISTANT: ", "</s>"),
    "cjz__zephyr": ("<|user|>\n", "<|assistant|>\n", "</s>"),
    "llamacpp__Qwen-QwQ-32B": ("<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>"),
    "llamacpp__deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
    "llamacpp__NousResearch-Hermes-3-Llama-3.1-8B-tool_use": (
        *("<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>"),
    ),
    "trl__llava_next": ("[INST] ", "[/INST] ", "</s>"),
}


@pytest.fixture(scope="module")
def stories(shared_data) -> Tokenizer:
    return load_tokenizer(shared_data / "models/stories260K")


@pytest.fixture(scope="module")
def demo() -> Tokenizer:
    return load_tokenizer(demo_folder("lumen-demo"))


def learned(encoded: Encoded, tokenizer: Tokenizer) -> list[str]:
    """The text of each unbroken run of learned tokens."""
    runs, ids = [], []
    for id, learn in zip([*encoded.ids, 0], [*encoded.learn, False], strict=True):
        if learn:
            ids.append(id)
        elif ids:
            runs.append(tokenizer.decode(ids))
            ids = []
    return runs


def talk(*contents: str, parts: bool = False, tools: tuple[dict, ...] = ()) -> Conversation:
    said = [[{"type": "text", "text": text}] if parts else text for text in contents]
    turns = [Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(said)]
    return Conversation(tuple(turns), tools, source="data.jsonl:3")


def tool(shared_data: Path) -> tuple[dict, ...]:
    cases = json.loads((shared_data / "chat_templates/inputs.json").read_text())
    return tuple(cases["tools_roundtrip"]["tools"])


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_whose_turns_cannot_be_found_trains_with_markers(name, shared_data, stories, demo):
    instruction, response, end = REFUSED[name]
    source = (shared_data / "chat_templates" / f"{name}.jinja").read_text()
    parts, tools = "llava" in name, tool(shared_data) if "tool_use" in name else ()
    conversation = talk("One?", "It is 1.", "Two?", "It is 2.", parts=parts, tools=tools)
    for tokenizer in (stories, demo):
        template = ChatTemplate(source, "<s>", end or "</s>", now=NOW)
        encoded = encode_by_markers(
            conversation, tokenizer, template, Markers(instruction=instruction, response=response)
        )
        wanted = ["It is 1." + end, "It is 2." + end]
        spelled = "".maketrans("▁", " ")  # SentencePiece writes one for the other
        runs = [run.strip().translate(spelled) for run in learned(encoded, tokenizer)]
        assert runs == [run.translate(spelled) for run in wanted]
        text = template.render(conversation.messages, tools=list(tools) or None)
        bos = tokenizer.id_to_token(tokenizer.bos_id)
        assert tokenizer.decode(encoded.ids).removeprefix(bos).translate(spelled).split() == (
            text.removeprefix(bos).translate(spelled).split()
        )


MARKERS = Markers(instruction="\n\n### Instruction:\n", response="\n\n### Response:\n")


def test_blanks_of_the_markers_are_taken_loosely(demo):
    for text in (
        "### Instruction:\nOne?\n\n### Response:\nIt is 1.\n\n### Instruction:\nTwo?\n\n### Response:\nIt is 2.",
        "### Instruction: One?\n### Response: It is 1.\n### Instruction: Two?\n###  Response: It is 2.",
        "### Instruction:One?### Response:It is 1.### Instruction:Two?###\nResponse:It is 2.",
    ):
        encoded = encode_by_markers(Text(text, "t:1"), demo, None, MARKERS)
        runs = [run.strip() for run in learned(encoded, demo)]
        assert runs == ["It is 1.", "It is 2.<|end_of_text|>"] or runs == ["It is 1.", "It is 2.<|eot_id|>"], text


def test_blanks_of_an_answer_are_its_own(demo):
    text = "### Response:\n    indented\n  more\n\n### Instruction:\nnext"
    [run] = learned(encode_by_markers(Text(text, "t:1"), demo, None, MARKERS), demo)
    assert run == "    indented\n  more"


def test_no_letter_of_a_marker_is_learned_and_none_of_an_answer_lost(demo, stories):
    chance, pieces = random.Random(0), [" ", "\n", "\n\n", "a", "Word", "tea", ".", "é", "世", "#"]
    for tokenizer in (demo, stories):
        for _ in range(300):
            answers = ["".join(chance.choices(pieces, k=5)) + "w" for _ in range(2)]
            blank = chance.choice(["", " ", "\n"])
            text = "".join(f"USER:{blank}q? ASSISTANT:{blank}{answer}" for answer in answers)
            markers = Markers(instruction=f"USER:{blank}", response=f"ASSISTANT:{blank}")
            runs = learned(encode_by_markers(Text(text, "t:1"), tokenizer, None, markers), tokenizer)
            eos = tokenizer.id_to_token(tokenizer.eos_id)
            found = ["".join(run.removesuffix(eos).split()) for run in runs if run.strip()]
            # a token with letters of both, as ":Word", is the one thing that may be missing at a border
            assert all("".join(answer.split()).endswith(run) for run, answer in zip(found, answers, strict=True)), text
            if blank:
                assert found == ["".join(answer.split()) for answer in answers], text


def test_a_token_with_letters_of_both_sides_is_not_learned(demo):
    joined = next(token.text for token in demo.tokens if token and len(token.text) > 3 and token.text.isalpha())
    markers = Markers(instruction="Q", response="::" + joined[:2])
    [*runs] = learned(encode_by_markers(Text(f"::{joined} then", "t:1"), demo, None, markers), demo)
    assert not any(joined[2:] in run for run in runs) and "then" in runs[0]


def test_answers_are_chosen_by_train_on_and_by_weight(demo):
    template = ChatTemplate("{% for m in messages %}{{ m.role + ':\n' + m.content + '<|eot_id|>\n' }}{% endfor %}")
    markers = Markers(instruction="user:\n", response="assistant:\n")
    talked = talk("One?", "1", "Two?", "2")
    both = learned(encode_by_markers(talked, demo, template, markers), demo)
    assert [run.strip() for run in both] == ["1<|eot_id|>", "2<|eot_id|>"]
    [last] = learned(encode_by_markers(talked, demo, template, markers, "last-assistant"), demo)
    assert last.strip() == "2<|eot_id|>"
    unlearned = Conversation(
        (talked.turns[0], Turn("assistant", "1", weight=0), *talked.turns[2:]), source="data.jsonl:3"
    )
    assert learned(encode_by_markers(unlearned, demo, template, markers), demo) == [last]
    only = Markers(instruction="nowhere", response="assistant:\n")
    with pytest.raises(DataError, match=r"data\.jsonl:3: a turn has weight 0, but the markers find 1 answers where"):
        encode_by_markers(unlearned, demo, template, only)


def test_an_example_without_a_response_part_is_refused_by_its_place(demo):
    with pytest.raises(DataError, match=r"t:7: data.response_part '\\n\\n### Response:\\n' does not stand in 'One"):
        encode_by_markers(Text("One? 1", "t:7"), demo, None, MARKERS)
    with pytest.raises(DataError, match=r"data\.jsonl:3: The chat template refuses"):
        encode_by_markers(talk("One?", "1"), demo, ChatTemplate("{{ raise_exception('no') }}"), MARKERS)


def test_a_marker_without_a_word_is_refused():
    with pytest.raises(ConfigError, match=r"data\.response_part wants a text to look for"):
        Markers(instruction="Q:", response=" \n")


def test_an_empty_answer_teaches_nothing_and_is_no_error(demo):
    text = "### Response:\n\n### Instruction:\nOne?"
    encoded = encode_by_markers(Text(text, "t:1"), demo, None, MARKERS)
    assert not any(encoded.learn)


def test_a_text_that_ends_with_eos_gets_no_second_one(stories):
    markers = Markers(instruction="Q:", response="A:")
    for text in ("Q: one A: two", "Q: one A: two</s>"):
        ids = encode_by_markers(Text(text, "t:1"), stories, None, markers).ids
        assert ids.count(stories.eos_id) == 1 and ids.count(stories.bos_id) == 1 and ids[0] == stories.bos_id
