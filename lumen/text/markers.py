"""What is learned of a text by two markers in it: for chat templates whose turns cannot be found, and for plain texts.

    ### Instruction:⏎One?⏎⏎### Response:⏎It is 1.</s>⏎⏎### Instruction:⏎…
    ── instruction_part ─   response_part ────────────                      learned: from the end of a response_part
                                          ─ learned ────                    to the next instruction_part, or to the end

Blanks are taken loosely: those at a marker's ends may be missing in the text, those inside it may be others. Blanks at
its ends are the marker's, as many as it has.

A token is learned if it lies wholly between the markers; blanks at its own ends may reach into a marker's (the token
" It" after "ASSISTANT: "), but a token of blanks alone may not. So no letter of a marker is ever learned, and none of
an answer is lost, unless a token has letters of both, which then is not learned.

Markers know text and no roles: a question that quotes a response_part is cut there, and the result of a tool between
two answers is learned with them. Where a template's turns can be found (`turns.py`), they are the better way.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from lumen.errors import ConfigError, DataError
from lumen.text.chat_format import Span
from lumen.text.conversation import Conversation, Encoded, Text
from lumen.text.template import ChatTemplate
from lumen.text.tokenizer import Tokenizer
from lumen.text.turns import with_bos


@dataclass(frozen=True, kw_only=True)
class Markers:
    """`data.instruction_part` and `data.response_part`: what stands before a question, and before an answer."""

    instruction: str
    response: str

    def __post_init__(self) -> None:
        for key, part in (("instruction_part", self.instruction), ("response_part", self.response)):
            if not part.strip():
                raise ConfigError(f"data.{key} wants a text to look for, found {part!r}.")

    def spans(self, text: str) -> Iterator[Span]:
        """[start, end) in characters of each stretch between the markers that is more than blanks, in order."""
        response, instruction = _pattern(self.response), _pattern(self.instruction)
        place = 0
        while opened := response.search(text, place):
            closed = instruction.search(text, opened.end())
            place = closed.start() if closed else len(text)
            if text[opened.end() : place].strip():
                yield opened.end(), place


def _pattern(marker: str) -> re.Pattern:
    words = marker.split()
    before, after = len(marker) - len(marker.lstrip()), len(marker) - len(marker.rstrip())
    return re.compile(rf"\s{{0,{before}}}" + r"\s+".join(map(re.escape, words)) + rf"\s{{0,{after}}}")


def encode_by_markers(
    record: Conversation | Text,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    markers: Markers,
    train_on: str = "all-assistant",
) -> Encoded:
    """The record as the template writes it, or a text with the EOS token after it, and which of its ids are learned.

    train_on  `all-assistant` or `last-assistant`, the last stretch alone

    It may be that nothing is learned, where nothing stands between the markers. DataError, with the record's source,
    where no response_part is found, and for a weight of 0 that fits no stretch.
    """
    text = _text(record, tokenizer, template)
    spans = list(markers.spans(text))
    if not spans and not _pattern(markers.response).search(text):
        begin = text if len(text) < 200 else text[:200] + "…"
        raise DataError(f"{record.source}: data.response_part {markers.response!r} does not stand in {begin!r}.")
    spans = _weighted(record, spans)
    if train_on == "last-assistant":
        spans = spans[-1:]
    ids, offsets = tokenizer.encode_with_offsets(text)
    learn = _inside(text, offsets, spans)
    return with_bos(ids, learn, tokenizer, record.source)


def _text(record: Conversation | Text, tokenizer: Tokenizer, template: ChatTemplate | None) -> str:
    if isinstance(record, Text):
        if tokenizer.eos_id is None:
            raise DataError(f"{record.source}: the tokenizer names no EOS token, so nothing could end this text.")
        eos = tokenizer.id_to_token(tokenizer.eos_id)
        return record.text if record.text.rstrip().endswith(eos) else record.text + eos
    try:
        return template.render(record.messages, tools=list(record.tools) or None)
    except DataError as refusal:
        raise DataError(f"{record.source}: {refusal}") from refusal


def _weighted(record: Conversation | Text, spans: list[Span]) -> list[Span]:
    """The stretches whose turn is to be learned."""
    turns = [] if isinstance(record, Text) else [turn for turn in record.turns if turn.role == "assistant"]
    if all(turn.weight for turn in turns):
        return spans
    if len(turns) != len(spans):
        raise DataError(
            f"{record.source}: a turn has weight 0, but the markers find {len(spans)} answers where the conversation "
            f"has {len(turns)}: which one is it?"
        )
    return [span for span, turn in zip(spans, turns, strict=True) if turn.weight]


def _inside(text: str, offsets: list[Span], spans: list[Span]) -> list[bool]:
    """For each token, whether it lies in one of `spans`; both ascend."""
    learn, number = [], 0
    for begin, stop in offsets:
        while number < len(spans) and spans[number][1] <= begin:
            number += 1
        start, end = spans[number] if number < len(spans) else (len(text), len(text))
        words = text[begin:stop].strip()
        if words:
            first = begin + text[begin:stop].index(words)
            learn.append(start <= first and first + len(words) <= end)
        else:
            learn.append(start <= begin < end and stop <= end)
    return learn
