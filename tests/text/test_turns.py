"""What is learned of a conversation, to the token, for every template; and the turns found in templates."""

import json
import random
import re
import shutil
from datetime import datetime
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Library

from lumen.errors import ConfigError, DataError
from lumen.spec import Family
from lumen.text.chat_format import write_jinja
from lumen.text.conversation import Conversation, Encoded, PromptCompletion, Text, Turn
from lumen.text.named_formats import load_format
from lumen.text.template import ChatTemplate
from lumen.text.tokenizer import Tokenizer, load_tokenizer
from lumen.text.turns import (
    chat_template,
    encode_conversation,
    encode_prompt_completion,
    encode_text,
    find_turns,
    prompt_ids,
    question_ids,
)

# Tokens of the templates' families, so that one tokenizer serves all of them. The first row ends answers.
STOPS = (
    "<EOS> <|im_end|> <|eot_id|> <|eom_id|> <end_of_turn> <|end|> <|return|> <|call|> <|end_of_text|> "
    "<|END_OF_TURN_TOKEN|>"
)
STRUCTURE = (
    "<BOS> <|im_start|> <|start_header_id|> <|end_header_id|> [INST] [/INST] <start_of_turn> <|start|> <|message|> "
    "<|channel|> <|user|> <|assistant|> <|system|> <|start_of_role|> <|end_of_role|> <|im_sep|> [SYSTEM_PROMPT]"
)
# Qwen 2's own pattern, from the tokenizer.json of its release.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NOW = datetime(2024, 7, 26)


@pytest.fixture(scope="module")
def byte_level(shared_data, tmp_path_factory) -> Tokenizer:
    """Qwen 2's real merges with the tokens of all families; begins texts with BOS."""
    folder, qwen = tmp_path_factory.mktemp("byte_level"), shared_data / "tokenizers" / "qwen2"
    library = Library(models.BPE.from_file(str(qwen / "vocab.json"), str(qwen / "merges.txt")))
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORDS), "isolated"), bytes_of])
    library.decoder = decoders.ByteLevel()
    special = f"{STOPS} {STRUCTURE}".split()
    library.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    library.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"bos_token": "<BOS>", "eos_token": "<EOS>", "add_bos_token": True})
    write_json(
        folder / "generation_config.json", {"eos_token_id": [library.token_to_id(stop) for stop in STOPS.split()]}
    )
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def sentencepiece(shared_data, tmp_path_factory) -> Tokenizer:
    """Mistral's real tokenizer v3, which has [INST] and begins texts with <s>."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    model = shared_data / "tokenizers" / "mistral" / "mistral_instruct_tokenizer_240323.model.v3"
    shutil.copy(model, folder / "tokenizer.model")
    write_json(folder / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True})
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def stories(shared_data) -> Tokenizer:
    return load_tokenizer(shared_data / "models" / "stories260K")


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def read_template(shared_data: Path, name: str) -> ChatTemplate:
    return ChatTemplate((shared_data / "chat_templates" / f"{name}.jinja").read_text(), "<BOS>", "<EOS>", now=NOW)


def talk(*contents: str, system: str | None = None, source: str = "") -> Conversation:
    turns = [Turn("system", system)] if system else []
    turns += [Turn(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)]
    return Conversation(tuple(turns), source=source)


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


# --- masks of every template -----------------------------------------------------------------------------------------

# What is learned of an answer "A" in the history, and of one that is the last.
LEARNED = {
    "axolotl__llama3_2_vision": ("A<|eot_id|>",) * 2,
    "axolotl__mistral_v7_tekken": ("A<EOS>",) * 2,
    "axolotl__phi_4": ("A<|im_end|>",) * 2,
    "axolotl__pixtral": ("A<EOS>",) * 2,
    "cjz__llama-2-chat": ("\n\n         A <EOS>",) * 2,  # this copy of the template indents what it writes
    "cjz__mistral-instruct": ("\n         A<EOS>",) * 2,
    "llamacpp__CohereForAI-c4ai-command-r7b-12-2024-tool_use": (
        ("<|START_RESPONSE|>A<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",) * 2
    ),
    "llamacpp__Mistral-Small-3.2-24B-Instruct-2506": ("A<EOS>",) * 2,
    "llamacpp__Qwen-Qwen2.5-7B-Instruct": ("A<|im_end|>",) * 2,
    "llamacpp__Qwen-Qwen3-0.6B": ("A<|im_end|>", "<think>\n\n</think>\n\nA<|im_end|>"),
    "llamacpp__google-gemma-2-2b-it": ("A<end_of_turn>",) * 2,
    "llamacpp__ibm-granite-granite-3.3-2B-Instruct": ("A<|end_of_text|>",) * 2,
    "llamacpp__meta-llama-Llama-3.1-8B-Instruct": ("A<|eot_id|>",) * 2,
    "llamacpp__meta-llama-Llama-3.2-3B-Instruct": ("A<|eot_id|>",) * 2,
    "llamacpp__microsoft-Phi-3.5-mini-instruct": ("A<|end|>",) * 2,
    "llamacpp__mistralai-Mistral-Nemo-Instruct-2407": ("A<EOS>",) * 2,
    "llamacpp__openai-gpt-oss-120b": ("<|channel|>final<|message|>A<|end|>", "<|channel|>final<|message|>A<|return|>"),
    "mistralcommon__v1_spm": (" A<EOS>",) * 2,
    "mistralcommon__v3_spm": (" A<EOS>",) * 2,
    "mistralcommon__v7": ("A<EOS>",) * 2,
    "trl__gemma3": ("A<end_of_turn>",) * 2,
    "trl__lfm2": ("A<|im_end|>",) * 2,
    "trl__llama3_training": ("A<|eot_id|>",) * 2,
    "trl__qwen2_5_vl": ("A<|im_end|>",) * 2,
    "trl__qwen3_training": ("<think>\n\n</think>\n\nA<|im_end|>",) * 2,
}
CUT = {  # a token reaches from the prompt into the answer, because the tokenizer lacks this family's own tokens
    "cjz__llama-2-chat",
    "cjz__mistral-instruct",
    "llamacpp__CohereForAI-c4ai-command-r7b-12-2024-tool_use",
}
UNLIKE = "asks for this answer with .* but writes the answered turn as"
REFUSED = {
    "cjz__alpaca": UNLIKE,  # these copies of the templates write one line feed more after a prompt
    "cjz__chatml": UNLIKE,
    "cjz__falcon-instruct": UNLIKE,
    "cjz__llama-3-instruct": UNLIKE,
    "cjz__vicuna": UNLIKE,
    "cjz__zephyr": UNLIKE,
    "llamacpp__Qwen-QwQ-32B": UNLIKE,  # the prompt opens <think>, the history has none
    "llamacpp__deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": UNLIKE,
    "llamacpp__NousResearch-Hermes-3-Llama-3.1-8B-tool_use": "TypeError",  # wants tools
    "trl__llava_next": "UndefinedError",  # wants contents in parts
}


def test_every_template_is_either_masked_or_refused(shared_data):
    names = {path.stem for path in (shared_data / "chat_templates").glob("*.jinja")}
    assert len(names) == 35 and names == LEARNED.keys() | REFUSED.keys()


@pytest.mark.parametrize("name", LEARNED)
def test_the_words_and_the_end_of_each_answer_are_learned_and_nothing_else(name, shared_data, byte_level):
    template = read_template(shared_data, name)
    conversation = talk("One?", "It is 1.", "", "It is 2.", "Three?", "Es ist 3, 世界🙂.")
    encoded = encode_conversation(conversation, byte_level, template)
    *history, last = (re.sub(r"\bA\b", "{}", text) for text in LEARNED[name])
    wanted = [history[0].format("It is 1."), history[0].format("It is 2."), last.format("Es ist 3, 世界🙂.")]
    assert learned(encoded, byte_level) == wanted


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_cannot_be_masked_exactly_is_refused_with_the_reason(name, shared_data, byte_level):
    with pytest.raises(DataError, match=f"data.jsonl:3: .*{REFUSED[name]}"):
        encode_conversation(talk("One?", "1", source="data.jsonl:3"), byte_level, read_template(shared_data, name))


@pytest.mark.parametrize("name", LEARNED)
def test_the_ids_are_those_of_the_rendered_text_with_one_bos(name, shared_data, byte_level):
    template = read_template(shared_data, name)
    conversation = talk("One?", "1", "Two?", "2")
    ids = encode_conversation(conversation, byte_level, template).ids
    text = template.render(conversation.messages)
    count = max(1, text.count("<BOS>"))  # Llama 2 begins every exchange with one
    assert ids.count(byte_level.bos_id) == count
    assert byte_level.decode(ids).removeprefix("<BOS>") == text.removeprefix("<BOS>")
    assert (byte_level.encode(text) in (ids, ids[1:])) == (name not in CUT)


def test_bos_is_never_doubled_nor_added_to_a_tokenizer_without(shared_data, byte_level, sentencepiece, tmp_path):
    for name in LEARNED:
        source = read_template(shared_data, name).source
        template = ChatTemplate(source, "<s>", "</s>", now=NOW)
        ids = prompt_ids(talk("One?").messages, sentencepiece, template)
        assert ids.count(sentencepiece.bos_id) == 1, name
    byte_level.save(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", {"bos_token": "<BOS>", "eos_token": "<EOS>", "add_bos_token": False})
    plain = load_tokenizer(tmp_path)
    assert plain.bos_id not in prompt_ids(talk("One?").messages, plain, ChatTemplate(CHATML))
    assert plain.bos_id not in encode_text(Text("One."), plain).ids


def random_words(chance: random.Random) -> str:
    pieces = ["\n", "\n\n", " ", "  ", "\t", "a", "foo", "Bar", ".", ":", "1", "é", "世界", "🙂", "'s", "</", "x\n"]
    return "".join(chance.choices(pieces, k=chance.randrange(1, 8))) + chance.choice(["w", "w ", "w\n", " w", "."])


@pytest.mark.parametrize("name", LEARNED)
def test_a_prompt_is_the_beginning_of_the_training_ids(name, shared_data, byte_level):
    template, chance = read_template(shared_data, name), random.Random(name)
    for _ in range(12):
        conversation = talk(*(random_words(chance) for _ in range(6)))
        encoded = encode_conversation(conversation, byte_level, template)
        prompt = prompt_ids(conversation.messages[:5], byte_level, template)
        assert encoded.ids[: len(prompt)] == prompt, conversation
        assert encoded.learn[len(prompt)] and not encoded.learn[len(prompt) - 1], conversation


@pytest.mark.parametrize("name", ["cjz__llama-2-chat", "mistralcommon__v1_spm", "mistralcommon__v3_spm"])
def test_a_prompt_is_the_beginning_of_the_training_ids_with_sentencepiece(name, shared_data, sentencepiece):
    template, chance = ChatTemplate(read_template(shared_data, name).source, "<s>", "</s>"), random.Random(name)
    for _ in range(25):
        conversation = talk(*(random_words(chance).strip() for _ in range(4)))
        encoded = encode_conversation(conversation, sentencepiece, template)
        prompt = prompt_ids(conversation.messages[:3], sentencepiece, template)
        assert encoded.ids[: len(prompt)] == prompt, conversation
        assert all(run.endswith("</s>") for run in learned(encoded, sentencepiece))


# --- what is learned -------------------------------------------------------------------------------------------------


def test_train_on_chooses_the_answers(byte_level):
    conversation, template = talk("One?", "1", "Two?", "2", system="Count."), ChatTemplate(CHATML)

    def choose(train_on: str) -> list[str]:
        return learned(encode_conversation(conversation, byte_level, template, train_on), byte_level)

    assert choose("all-assistant") == ["1<|im_end|>", "2<|im_end|>"]
    assert choose("last-assistant") == ["2<|im_end|>"]
    assert choose("everything") == [template.render(conversation.messages)]
    with pytest.raises(ConfigError, match="Did you mean 'everything'"):
        encode_conversation(conversation, byte_level, template, "every")


def test_a_turn_with_weight_zero_is_read_and_not_learned(byte_level):
    turns = (Turn("user", "One?"), Turn("assistant", "1", weight=0), Turn("user", "Two?"), Turn("assistant", "2"))
    template = ChatTemplate(CHATML)
    encoded = encode_conversation(Conversation(turns), byte_level, template)
    assert learned(encoded, byte_level) == ["2<|im_end|>"]
    assert encoded.ids == encode_conversation(talk("One?", "1", "Two?", "2"), byte_level, template).ids
    around = learned(encode_conversation(Conversation(turns), byte_level, template, "everything"), byte_level)
    assert around == [
        "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n",
        "\n<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n",
    ]
    with pytest.raises(DataError, match="nothing of it is learned"):
        encode_conversation(Conversation(turns[:2]), byte_level, template)


def tool_talk(shared_data: Path) -> Conversation:
    case = json.loads((shared_data / "chat_templates" / "inputs.json").read_text())["tools_roundtrip"]
    turns = []
    for message in case["messages"]:
        more = {key: message[key] for key in message if key not in ("role", "content")}
        turns.append(Turn(message["role"], message["content"], more=more))
    return Conversation(tuple(turns), tuple(case["tools"]))


CALL = '{"name": "get_weather", "arguments": {"city": "Zürich", "unit": "c"}'
TOOL_CALLS = {
    "llamacpp__Qwen-Qwen2.5-7B-Instruct": f"<tool_call>\n{CALL}}}\n</tool_call><|im_end|>",
    "llamacpp__Qwen-Qwen3-0.6B": f"<tool_call>\n{CALL}}}\n</tool_call><|im_end|>",
    "llamacpp__mistralai-Mistral-Nemo-Instruct-2407": f'[TOOL_CALLS][{CALL}, "id": "abc123def"}}]<EOS>',
    "llamacpp__meta-llama-Llama-3.1-8B-Instruct": CALL.replace("arguments", "parameters") + "}<|eot_id|>",
    "llamacpp__openai-gpt-oss-120b": (
        ' to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Zürich", "unit": "c"}<|call|>'
    ),
}


@pytest.mark.parametrize("name", TOOL_CALLS)
def test_a_tool_call_is_learned_and_its_result_is_not(name, shared_data, byte_level):
    conversation, template = tool_talk(shared_data), read_template(shared_data, name)
    encoded = encode_conversation(conversation, byte_level, template)
    call, answer = learned(encoded, byte_level)
    assert call == TOOL_CALLS[name] and "It is 7 degrees." in answer and "temp" not in answer
    for number in (1, 3):
        prompt = prompt_ids(conversation.messages[:number], byte_level, template, conversation.tools)
        assert encoded.ids[: len(prompt)] == prompt


@pytest.mark.parametrize(
    "name", ["trl__llama3_training", "trl__lfm2", "axolotl__phi_4", "llamacpp__microsoft-Phi-3.5-mini-instruct"]
)
def test_a_template_that_drops_tool_calls_is_refused_rather_than_taught_to_say_nothing(name, shared_data, byte_level):
    with pytest.raises(DataError, match="message 2: the chat template does not write its tool calls"):
        encode_conversation(tool_talk(shared_data), byte_level, read_template(shared_data, name))


def test_a_template_that_drops_the_system_text_is_refused(shared_data, byte_level):
    template = read_template(shared_data, "llamacpp__mistralai-Mistral-Nemo-Instruct-2407")
    with pytest.raises(DataError, match="message 1: the chat template does not write its content"):
        encode_conversation(talk("One?", "1", system="Count."), byte_level, template)


def test_thinking_is_learned_in_the_last_turn_and_dropped_from_the_history(shared_data, byte_level):
    conversation = talk("2+2?", "<think>\nadd\n</think>\n\n4", "3+3?", "<think>\nagain\n</think>\n\n6")
    encoded = encode_conversation(conversation, byte_level, read_template(shared_data, "llamacpp__Qwen-Qwen3-0.6B"))
    assert learned(encoded, byte_level) == ["4<|im_end|>", "<think>\nagain\n</think>\n\n6<|im_end|>"]
    kept = encode_conversation(conversation, byte_level, read_template(shared_data, "trl__qwen3_training"))
    assert learned(kept, byte_level) == [f"{turn.content}<|im_end|>" for turn in conversation.turns[1::2]]


def test_where_the_prompt_opens_thoughts_only_the_last_answer_can_be_learned(byte_level):
    template = ChatTemplate(write_jinja(load_format("qwen3-thinking").chat))
    conversation = talk("One?", "1", "Two?", "<think>\nwell\n</think>\n\n2")
    with pytest.raises(DataError, match=r"message 2: .*learn the last answer alone \(data.train_on = 'last"):
        encode_conversation(conversation, byte_level, template)
    encoded = encode_conversation(conversation, byte_level, template, "last-assistant")
    assert learned(encoded, byte_level) == ["well\n</think>\n\n2<|im_end|>"]
    prompt = prompt_ids(conversation.messages[:3], byte_level, template)
    assert encoded.ids[: len(prompt)] == prompt and encoded.learn[len(prompt)]
    unlearned = Conversation((conversation.turns[0], Turn("assistant", "1", weight=0), *conversation.turns[2:]))
    assert encode_conversation(unlearned, byte_level, template) == encoded


def test_of_a_named_format_the_words_and_the_end_are_learned(byte_level):
    for name, end in (
        ("chatml", "<|im_end|>"),
        ("llama-3", "<|eot_id|>"),
        ("gpt-oss", "<|end|>"),
        ("mistral", "<EOS>"),
    ):
        template = ChatTemplate(write_jinja(load_format(name).chat), "<BOS>", "<EOS>", now=NOW)
        first, last = learned(encode_conversation(talk("One?", "1", "Two?", "2"), byte_level, template), byte_level)
        assert first.endswith("1" + end) and last.endswith("2" + end.replace("<|end|>", "<|return|>"))
    template = ChatTemplate(write_jinja(load_format("qwen-3").chat))
    runs = learned(encode_conversation(talk("One?", "1", "Two?", "2"), byte_level, template), byte_level)
    assert runs == ["1<|im_end|>", "<think>\n\n</think>\n\n2<|im_end|>"]


def test_an_answer_after_a_history_that_was_rewritten_is_still_found(shared_data, byte_level):
    calls = tool_talk(shared_data)
    thought = Turn("assistant", "", more={**calls.turns[1].more, "reasoning_content": "Look it up."})
    turns = (calls.turns[0], thought, *calls.turns[2:], Turn("user", "Thanks."), Turn("assistant", "Bye."))
    template = read_template(shared_data, "llamacpp__Qwen-Qwen3-0.6B")
    encoded = encode_conversation(Conversation(turns, calls.tools), byte_level, template)
    assert learned(encoded, byte_level)[1:] == ["It is 7 degrees.<|im_end|>", "<think>\n\n</think>\n\nBye.<|im_end|>"]
    assert "Look it up." not in byte_level.decode(encoded.ids)


def test_contents_in_parts_are_masked(shared_data, byte_level):
    question = [{"type": "image"}, {"type": "text", "text": "What?"}]
    turns = (Turn("user", question), Turn("assistant", [{"type": "text", "text": "A cat."}]))
    encoded = encode_conversation(Conversation(turns), byte_level, read_template(shared_data, "trl__gemma3"))
    assert learned(encoded, byte_level) == ["A cat.<end_of_turn>"]


def test_marks_of_the_template_narrow_what_is_learned(byte_level):
    source = (
        "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}{% else %}<|assistant|>final"
        "<|message|>{% generation %}{{ m.content }}{% endgeneration %} (done)<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    encoded = encode_conversation(talk("One?", "It is 1"), byte_level, ChatTemplate(source))
    assert learned(encoded, byte_level) == ["It is 1", "<|end|>"]


def test_an_answer_that_quotes_an_end_or_a_question_is_learned_to_its_own_end(byte_level):
    conversation = talk("user\nOne?", "One?<|im_end|>\n<|im_start|>user\nTwo?", "One?", "One?")
    encoded = encode_conversation(conversation, byte_level, ChatTemplate(CHATML))
    assert learned(encoded, byte_level) == [f"{conversation.turns[1].content}<|im_end|>", "One?<|im_end|>"]


# --- the border between prompt and answer ----------------------------------------------------------------------------

OPEN = (
    "{% for m in messages %}{{ 'Q: ' + m.content + '\n' if m.role == 'user' else 'A: ' + m.content + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
)


def test_a_token_that_would_cross_the_border_is_cut_there(byte_level):
    template = ChatTemplate(OPEN, "", "<EOS>")
    conversation = talk("one", "foo", "two", "bar")
    encoded = encode_conversation(conversation, byte_level, template)
    whole = byte_level.encode(template.render(conversation.messages))
    assert encoded.ids[1:] != whole, "this text was to have tokens across the borders"
    assert byte_level.decode(encoded.ids[1:]) == byte_level.decode(whole)
    assert learned(encoded, byte_level) == ["foo<EOS>", "bar<EOS>"]
    for number in (1, 3):
        prompt = prompt_ids(conversation.messages[:number], byte_level, template)
        assert encoded.ids[: len(prompt)] == prompt


def test_a_crossing_token_that_cannot_be_cut_without_changing_the_text_is_refused(sentencepiece):
    template = ChatTemplate(OPEN, "", "</s>")
    with pytest.raises(DataError, match="prompt and answer share a token"):
        encode_conversation(talk("one", "foo"), sentencepiece, template)


def test_a_template_without_an_end_this_tokenizer_knows_is_refused(stories, byte_level):
    with pytest.raises(DataError, match=r"message 2: after the answer .* '<\|im_end\|>\\n', in which no token ends"):
        encode_conversation(talk("one", "foo", source="x:1"), stories, ChatTemplate(CHATML, "<s>", "</s>"))
    endless = OPEN.replace("eos_token", "'\n'")
    with pytest.raises(DataError, match="in which no token ends a generation"):
        encode_conversation(talk("one", "foo", "two<EOS>", "bar"), byte_level, ChatTemplate(endless))


# --- turns -----------------------------------------------------------------------------------------------------------


def test_the_turns_of_llama_3_1_are_found(shared_data):
    turns = find_turns(read_template(shared_data, "llamacpp__meta-llama-Llama-3.1-8B-Instruct"))
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    assert turns.begin == "<BOS>"
    date = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    assert turns.system == (header.format("system") + date, "<|eot_id|>") and turns.default_system == ""
    assert turns.user == (header.format("user"), "<|eot_id|>")
    assert turns.assistant == (header.format("assistant"), "<|eot_id|>")
    assert turns.prompt == header.format("assistant")
    assert turns.trim == {"system", "user", "assistant"}


def test_the_turns_of_formats_with_other_systems_are_found(shared_data):
    gemma = find_turns(read_template(shared_data, "trl__gemma3"))
    assert gemma.system_in_user and gemma.system == ("", "\n\n")
    assert find_turns(read_template(shared_data, "llamacpp__google-gemma-2-2b-it")).system is None
    qwen = find_turns(read_template(shared_data, "llamacpp__Qwen-Qwen2.5-7B-Instruct"))
    assert qwen.default_system == "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    phi = find_turns(read_template(shared_data, "llamacpp__microsoft-Phi-3.5-mini-instruct"))
    assert phi.assistant == ("<|assistant|>\n", "<|end|>\n") and phi.default_system is None and phi.begin == ""


FOUND = {
    *(
        "axolotl__llama3_2_vision",
        "axolotl__mistral_v7_tekken",
        "axolotl__phi_4",
        "cjz__chatml",
        "cjz__llama-3-instruct",
    ),
    *("cjz__zephyr", "llamacpp__Mistral-Small-3.2-24B-Instruct-2506", "llamacpp__Qwen-Qwen2.5-7B-Instruct"),
    *("llamacpp__Qwen-Qwen3-0.6B", "llamacpp__deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", "mistralcommon__v1_spm"),
    *("llamacpp__google-gemma-2-2b-it", "llamacpp__ibm-granite-granite-3.3-2B-Instruct", "mistralcommon__v7"),
    *("llamacpp__meta-llama-Llama-3.1-8B-Instruct", "llamacpp__meta-llama-Llama-3.2-3B-Instruct", "trl__gemma3"),
    *("llamacpp__microsoft-Phi-3.5-mini-instruct", "llamacpp__openai-gpt-oss-120b", "trl__lfm2", "trl__qwen2_5_vl"),
    "trl__llama3_training",
}


@pytest.mark.parametrize("name", sorted(LEARNED.keys() | REFUSED.keys()))
def test_turns_write_what_the_template_does_or_are_refused(name, shared_data):
    template, chance = read_template(shared_data, name), random.Random(name)
    if name not in FOUND:
        with pytest.raises(DataError, match=r"cannot be written as turns|refuses this conversation"):
            find_turns(template)
        return
    turns = find_turns(template)
    for system in (None, random_words(chance)):
        if system and turns.system is None:
            continue
        for count in (1, 3, 7):
            messages = talk(*(random_words(chance) for _ in range(count)), system=system).messages
            assert turns.fits(messages)
            assert turns.write(messages) == template.render(messages, add_generation_prompt=True)


def test_a_template_that_says_a_message_twice_or_not_at_all_has_no_turns():
    for source in (CHATML.replace("m.content", "m.content + m.content"), CHATML.replace("m.content", "'x'")):
        with pytest.raises(DataError, match="does not write every message once"):
            find_turns(ChatTemplate(source))


def test_a_template_whose_turns_depend_on_their_words_has_none():
    with pytest.raises(DataError, match="cannot be written as turns: of"):
        find_turns(ChatTemplate(CHATML.replace("m.content", "(m.content or 'empty')")))


# --- plain text ------------------------------------------------------------------------------------------------------


def test_of_a_prompt_and_completion_the_completion_and_eos_are_learned(byte_level, sentencepiece, stories):
    for tokenizer in (byte_level, sentencepiece, stories):
        eos = tokenizer.id_to_token(tokenizer.eos_id)
        encoded = encode_prompt_completion(PromptCompletion("Once upon a time", " there was a cat.", "x:1"), tokenizer)
        assert encoded.ids[0] == tokenizer.bos_id and encoded.ids.count(tokenizer.bos_id) == 1
        assert encoded.source == "x:1" and encoded.ids[-1] == tokenizer.eos_id
        assert [run.strip() for run in learned(encoded, tokenizer)] == [f"there was a cat.{eos}"]
        assert encoded.ids[: encoded.learn.index(True)] == question_ids("Once upon a time", tokenizer)
    crossing = encode_prompt_completion(PromptCompletion("Answer: ", "four"), byte_level)
    assert learned(crossing, byte_level) == ["four<EOS>"]
    assert crossing.ids[: crossing.learn.index(True)] == question_ids("Answer: ", byte_level)


def test_all_of_a_text_and_its_eos_is_learned(stories):
    encoded = encode_text(Text("Once upon a time.", "x:1"), stories)
    assert encoded.ids == [stories.bos_id, *stories.encode("Once upon a time."), stories.eos_id]
    assert encoded.learn == [False] + [True] * (len(encoded.ids) - 1)


def test_a_question_is_asked_through_the_tokenizers_own_template(byte_level):
    assert chat_template(byte_level) is None
    asked = byte_level.with_chat_template(CHATML)
    template = chat_template(asked)
    assert (template.bos_token, template.eos_token) == ("<BOS>", "<EOS>")
    wanted = "<BOS><|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n"
    assert byte_level.decode(question_ids("One?", asked)) == wanted


@pytest.mark.parametrize("page", [name for name in Family.names() if Family.load(name).page.chat])
def test_the_template_made_from_a_page_has_the_turns_of_the_page(page):
    chat = Family.load(page).page.chat
    turns = find_turns(ChatTemplate(write_jinja(chat), "<BOS>", "<EOS>", now=NOW))

    def fill(*texts: str) -> tuple[str, ...]:
        return tuple(text.replace("{bos}", "<BOS>").replace("{eos}", "<EOS>") for text in texts)

    assert ((turns.begin,), turns.user, turns.assistant) == (fill(chat.begin), fill(*chat.user), fill(*chat.assistant))
    assert turns.system == (fill(*chat.system) if chat.system else None)
    assert turns.system_in_user == chat.system_in_user and turns.default_system == chat.default_system
    roles = {"user", "assistant"} | ({"system"} if chat.system else set())
    assert turns.trim == (roles if chat.trim else set())


def test_the_template_made_from_the_llama_3_page_writes_what_metas_own_does(shared_data):
    ours = ChatTemplate(write_jinja(Family.load("llama3").page.chat))
    theirs = (shared_data / "chat_templates/trl__llama3_training.jinja").read_text("utf-8")
    messages = [{"role": "system", "content": " be brief "}, {"role": "user", "content": "hi\n"}]
    wanted = ChatTemplate(theirs, bos_token="<|begin_of_text|>").render(messages, add_generation_prompt=True)
    assert ours.render(messages, add_generation_prompt=True) == wanted
    with pytest.raises(DataError, match="no turn for the role tool"):
        ours.render([{"role": "tool", "content": "42"}])


def test_a_text_that_mentions_the_bos_token_still_begins_with_one(shared_data):
    tokenizer = load_tokenizer(shared_data / "models/stories260K")
    ids = encode_text(Text("It cost <s>20</s> dollars."), tokenizer).ids
    assert ids[0] == tokenizer.bos_id and ids.count(tokenizer.bos_id) == 2
    assert encode_text(Text("<s>It cost 20 dollars."), tokenizer).ids.count(tokenizer.bos_id) == 1
