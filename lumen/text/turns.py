"""Conversations, prompts and texts become token ids, and which of them are learned.

What is learned of an assistant's turn is what a model would have to generate, given the prompt, and nothing else:

    …<|im_end|>⏎<|im_start|>assistant⏎   It is noon.  <|im_end|>   ⏎<|im_start|>user⏎…
    ─────────── the prompt ───────────   ── words ──  ── end ───   ── not learned ──

    the prompt   as the template ends it with `add_generation_prompt`: the training text must begin with it, or the
                 conversation is refused, since the answer would be learned after something that chat never says
    the words    all up to the end: what the template puts in front of the content (as `<think>`) is generated, too
    the end      the first of the tokenizer's `stop_ids` after the content; without one, generation would not stop

A template that marks `{% generation %}` narrows the words to its marks.

The text is rendered once and tokenized once. A token that reaches across the end of a prompt (the blank that a prompt
ends in, and the answer's first word) could not be generated after that prompt; there the text is cut, and both sides
are tokenized for themselves. So the ids of a prompt are always the first ids of the training text.
"""

import copy
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise

from lumen.errors import ConfigError, DataError, closest
from lumen.text.chat_format import Span, Turns, find_turns, sentinel, shared_length
from lumen.text.conversation import Conversation, Encoded, PromptCompletion, Text
from lumen.text.template import ChatTemplate
from lumen.text.tokenizer import Tokenizer

__all__ = [
    "Turns",
    "chat_template",
    "encode_conversation",
    "encode_prompt_completion",
    "encode_text",
    "find_turns",
    "prompt_ids",
    "question_ids",
    "with_bos",
]

TRAIN_ON = ("all-assistant", "last-assistant", "everything")

_HERE = sentinel("here")
_GIVEN = {_HERE: ""}  # as the arguments of a tool call


# --- prompts ---------------------------------------------------------------------------------------------------------


def chat_template(tokenizer: Tokenizer, now: datetime | None = None) -> ChatTemplate | None:
    """The tokenizer's own chat template with its names for BOS and EOS; None where it has none."""
    if tokenizer.chat_template is None:
        return None
    bos, eos = ("" if id is None else tokenizer.id_to_token(id) for id in (tokenizer.bos_id, tokenizer.eos_id))
    return ChatTemplate(tokenizer.chat_template, bos_token=bos, eos_token=eos, now=now)


def prompt_ids(
    messages: Sequence[dict], tokenizer: Tokenizer, template: ChatTemplate, tools: Sequence[dict] | None = None
) -> list[int]:
    """The ids of a prompt for the next answer: exactly those that training puts before that answer."""
    text = template.render(messages, add_generation_prompt=True, tools=tools)
    answered = (number for number, message in enumerate(messages) if message["role"] == "assistant")
    earlier = [template.render(messages[:number], add_generation_prompt=True, tools=tools) for number in answered]
    ids, _ = _tokenize(text, tokenizer, [len(prompt) for prompt in earlier if text.startswith(prompt)])
    return _bos(ids, tokenizer) + ids


def question_ids(question: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of a prompt for one question, said by a user; where there is no chat template, the text to go on from."""
    if template := chat_template(tokenizer):
        return prompt_ids([{"role": "user", "content": question}], tokenizer, template)
    ids = tokenizer.encode(question)
    return _bos(ids, tokenizer) + ids


# --- training examples -----------------------------------------------------------------------------------------------


def encode_conversation(
    conversation: Conversation, tokenizer: Tokenizer, template: ChatTemplate, train_on: str = "all-assistant"
) -> Encoded:
    """The conversation as the template writes it, and which of its ids are learned.

    train_on  `all-assistant`, `last-assistant`, or `everything`; turns with weight 0 are learned in none of them

    Raises DataError, with the conversation's source, where the template refuses, where an answer cannot be found or
    stands after another prompt than chat would give, where no token ends a turn, and where nothing is learned.
    """
    if train_on not in TRAIN_ON:
        raise ConfigError(f"train_on wants {', '.join(TRAIN_ON)}; found {train_on!r}.{closest(train_on, TRAIN_ON)}")
    try:
        return _encode_conversation(conversation, tokenizer, template, train_on)
    except DataError as refusal:
        raise DataError(f"{conversation.source or 'conversation'}: {refusal}") from refusal


def encode_prompt_completion(record: PromptCompletion, tokenizer: Tokenizer) -> Encoded:
    """The prompt, read; the completion and the EOS token after it, learned."""
    ids, ends = _tokenize(record.prompt + record.completion, tokenizer, [len(record.prompt)])
    return _document(ids, [end > len(record.prompt) for end in ends], tokenizer, record.source)


def encode_text(record: Text, tokenizer: Tokenizer) -> Encoded:
    """The document and the EOS token after it, all learned."""
    ids = tokenizer.encode(record.text)
    return _document(ids, [True] * len(ids), tokenizer, record.source)


def _document(ids: list[int], learn: list[bool], tokenizer: Tokenizer, source: str) -> Encoded:
    """With BOS in front, where the tokenizer has it so, and EOS behind, where every document ends."""
    if tokenizer.eos_id is None:
        raise DataError(f"{source or 'record'}: the tokenizer names no EOS token, so nothing could end this text.")
    return with_bos([*ids, tokenizer.eos_id], [*learn, True], tokenizer, source)


def with_bos(ids: list[int], learn: list[bool], tokenizer: Tokenizer, source: str) -> Encoded:
    """The example, with BOS before it where the tokenizer has it so and the text does not begin with it."""
    bos = _bos(ids, tokenizer)
    learn = [False] * len(bos) + learn
    learn[0] = False  # nothing comes before the first id that could predict it
    return Encoded(bos + ids, learn, source)


def _encode_conversation(
    conversation: Conversation, tokenizer: Tokenizer, template: ChatTemplate, train_on: str
) -> Encoded:
    chat = _Chat.render(conversation, template)
    wanted = _learned_messages(conversation, train_on)
    answers = _answers(chat, wanted)
    ids, ends = _tokenize(chat.text, tokenizer, [answer.start for answer in answers])
    everything = train_on == "everything"
    learn = [everything] * len(ids)
    marked = _marked(chat)
    for answer in answers:
        if answer.message not in wanted:
            continue
        weighted = conversation.turns[answer.message].weight == 1
        first, stop = bisect_right(ends, answer.start), _stop(answer, ids, ends, chat.text, tokenizer)
        for t in range(first, stop + 1):
            learn[t] = weighted and (everything or t == stop or marked(ends[t]))
    encoded = with_bos(ids, learn, tokenizer, conversation.source)
    if not any(encoded.learn):
        raise DataError(f"nothing of it is learned with train_on = {train_on!r}.")
    return encoded


# --- answers in a rendered text --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """Where one assistant's turn stands in the text, in characters.

    message    its place among the messages
    start      the end of its prompt
    words_end  the end of its content
    limit      where the next message's content begins: the token that ends the turn stands before it
    """

    message: int
    start: int
    words_end: int
    limit: int


@dataclass(frozen=True, kw_only=True)
class _Chat:
    """A conversation, the template that renders it, and the text that it becomes."""

    messages: list[dict]
    tools: list[dict] | None
    template: ChatTemplate
    text: str

    @classmethod
    def render(cls, conversation: Conversation, template: ChatTemplate) -> "_Chat":
        messages, tools = conversation.messages, list(conversation.tools) or None
        text = template.render(messages, tools=tools)
        return cls(messages=messages, tools=tools, template=template, text=text)

    def prompt(self, number: int, probe: dict | None = None) -> str:
        """The prompt for message `number`; with `probe` in the place of the message before it."""
        history = [*self.messages[: number - 1], probe] if probe else self.messages[:number]
        return self.template.render(history, add_generation_prompt=True, tools=self.tools)

    def locate(self, number: int) -> Span:
        """Where the content of message `number` stands; of one with tool calls, the arguments of the last.

        The text is compared with one that has a sentinel in that place: they are alike up to it and after it. A message
        that the template drops, or writes twice, is refused.
        """
        for probe in _probes(self.messages[number]):
            messages = [*self.messages[:number], probe, *self.messages[number + 1 :]]
            before, *after = self.template.render(messages, tools=self.tools).split(_HERE)
            if len(after) == 1:
                start = shared_length(self.text, before)
                end = len(self.text) - shared_length(self.text[::-1], after[0][::-1])
                return min(start, end), end
        what = "tool calls" if self.messages[number].get("tool_calls") else "content"
        raise DataError(f"message {number + 1}: the chat template does not write its {what} exactly once.")


def _probes(message: dict) -> list[dict]:
    """Copies of `message` with a sentinel in what a template writes last, the best place first."""
    message = copy.deepcopy(message)
    if calls := message.get("tool_calls"):
        call = calls[-1].get("function", calls[-1])
        named = {**call, "name": _HERE}
        given = {
            **call,
            "arguments": json.dumps(_GIVEN, ensure_ascii=False) if isinstance(call.get("arguments"), str) else _GIVEN,
        }
        wrap = (lambda call: {**calls[-1], "function": call}) if "function" in calls[-1] else (lambda call: call)
        return [{**message, "tool_calls": [*calls[:-1], wrap(probe)]} for probe in (given, named)]
    if not isinstance(message["content"], list):
        return [{**message, "content": _HERE}]
    texts = [part for part in message["content"] if part.get("type") == "text"]
    for part in texts[-1:]:
        part["text"] = _HERE
    return [message] if texts else []


def _learned_messages(conversation: Conversation, train_on: str) -> set[int]:
    """The places of the assistant's messages that matter: an answer that is only read need not stand after a prompt."""
    numbers = [number for number, turn in enumerate(conversation.turns) if turn.role == "assistant"]
    if train_on == "last-assistant":
        numbers = numbers[-1:]
    return {number for number in numbers if train_on == "everything" or conversation.turns[number].weight == 1}


def _answers(chat: _Chat, wanted: set[int]) -> list[_Answer]:
    """The assistant's turns in the text: by the template's turns where they write it, else one by one."""
    return _answers_by_turns(chat) or _answers_by_probes(chat, wanted)


def _answers_by_turns(chat: _Chat) -> list[_Answer]:
    """The answers where the turns of the template write this very text; none where they do not.

    The last answer is probed for: many templates write it otherwise than those in the history.
    """
    try:
        turns = find_turns(chat.template)
    except DataError:
        return []
    last = len(chat.messages) - 1
    if chat.tools or not turns.fits(chat.messages) or chat.messages[last]["role"] != "assistant":
        return []
    known, spans = turns.place(chat.messages[:last])
    prompt = known + turns.prompt
    if not chat.text.startswith(prompt) or not turns.assistant[0].startswith(turns.prompt):
        return []
    spans.append(chat.locate(last))
    generated = len(turns.assistant[0]) - len(turns.prompt)  # of an answer, before its content
    answers = [
        _Answer(message=number, start=start - generated, words_end=end, limit=following)
        for number, ((start, end), (following, _)) in enumerate(pairwise(spans))
        if chat.messages[number]["role"] == "assistant"
    ]
    return [*answers, _Answer(message=last, start=len(prompt), words_end=spans[last][1], limit=len(chat.text))]


def _answers_by_probes(chat: _Chat, wanted: set[int]) -> list[_Answer]:
    """The answers, each found by rendering its prompt and probing for every message's content; of those that are not
    `wanted`, the ones that can be found.
    """
    spans = [chat.locate(number) for number in range(len(chat.messages))]
    limits = [start for start, _ in spans[1:]] + [len(chat.text)]
    answers = []
    for number, message in enumerate(chat.messages):
        if message["role"] != "assistant":
            continue
        try:
            start = _prompt_end(chat, number, spans)
        except DataError:
            if number in wanted:
                raise
            continue
        answers.append(_Answer(message=number, start=start, words_end=spans[number][1], limit=limits[number]))
    return answers


def _prompt_end(chat: _Chat, number: int, spans: list[Span]) -> int:
    """Where in the text the prompt for message `number` ends.

    A template may write the history otherwise once more follows (thinking is dropped before the last question). Then
    what counts of the prompt is what it adds after the message before.
    """
    prompt = chat.prompt(number)
    if chat.text.startswith(prompt):
        return len(prompt)
    for probe in _probes(chat.messages[number - 1]) if number else []:
        _, found, opening = chat.prompt(number, probe).rpartition(_HERE)
        if found and chat.text.startswith(opening, spans[number - 1][1]):
            return spans[number - 1][1] + len(opening)
    at = shared_length(chat.text, prompt)
    raise DataError(
        f"message {number + 1}: the chat template asks for this answer with {prompt[max(0, at - 20) :]!r}, but writes "
        f"the answered turn as {chat.text[max(0, at - 20) : at + 40]!r}: what is learned would not be what chat asks "
        f"for. Set data.chat_template to a template that writes both alike, learn the last answer alone "
        f"(data.train_on = 'last-assistant') if only earlier ones are written otherwise, or mark what is learned by "
        f"data.instruction_part and data.response_part."
    )


# --- ids of a rendered text ------------------------------------------------------------------------------------------


def _marked(chat: _Chat) -> Callable[[int], bool]:
    """Whether a token that ends at a character lies in `{% generation %}` marks; always, if the template has none."""
    if not re.search(r"\{%[-+]?\s*generation\b", chat.template.source):
        return lambda end: True
    rendering = chat.template.render_marked(chat.messages, tools=chat.tools)
    if rendering.text != chat.text:
        raise DataError("the chat template writes another text when its {% generation %} blocks are marked.")
    return lambda end: any(start < end <= stop for start, stop in rendering.spans)


def _stop(answer: _Answer, ids: list[int], ends: list[int], text: str, tokenizer: Tokenizer) -> int:
    """The index of the token that ends the answer."""
    t = bisect_right(ends, answer.words_end)
    while t < len(ids) and (t == 0 or ends[t - 1] < answer.limit):
        if ids[t] in tokenizer.stop_ids:
            return t
        t += 1
    after = text[answer.words_end : min(answer.limit, answer.words_end + 40)]
    stops = ", ".join(repr(tokenizer.id_to_token(id)) for id in tokenizer.stop_ids) or "none"
    raise DataError(
        f"message {answer.message + 1}: after the answer the chat template writes {after!r}, in which no token ends a "
        f"generation (this tokenizer's: {stops}). Set data.chat_template to a template for this tokenizer."
    )


def _tokenize(text: str, tokenizer: Tokenizer, cuts: Sequence[int]) -> tuple[list[int], list[int]]:
    """Ids of `text` and the character at which each ends, with no token across one of `cuts`.

    Where a token does reach across, the text before it and after it are tokenized for themselves. Raises DataError if
    that would change the text, as with SentencePiece, which puts a space before whatever it tokenizes.
    """
    ids, offsets = tokenizer.encode_with_offsets(text)
    ends = [end for _, end in offsets]
    crossed = next((cut for cut in cuts if 0 < cut < len(text) and ends[bisect_right(ends, cut) - 1] != cut), None)
    if crossed is None:
        return ids, ends
    left, left_ends = _tokenize(text[:crossed], tokenizer, [cut for cut in cuts if cut < crossed])
    right, right_ends = _tokenize(text[crossed:], tokenizer, [cut - crossed for cut in cuts if cut > crossed])
    if tokenizer.decode(left + right) not in (text, tokenizer.decode(ids)):
        around = text[max(0, crossed - 20) : crossed + 20]
        raise DataError(f"in {around!r} prompt and answer share a token, and cutting it would change the text.")
    return left + right, left_ends + [crossed + end for end in right_ends]


def _bos(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """What must still come before `ids`: BOS, where the tokenizer wants it and no template wrote it already."""
    if not tokenizer.add_bos:
        return []
    at = ids.index(tokenizer.bos_id) if tokenizer.bos_id in ids else None
    opens = at is not None and not tokenizer.decode(ids[:at]).strip()  # some templates write a line feed before it
    return [] if opens else [tokenizer.bos_id]
