"""A chat format as pairs around the words, found in any template.

A template can be rendered but not inverted: it does not say which characters are whose. So it is given conversations
whose contents are sentinels, words that stand nowhere else, and the text is cut where they appear. What is found counts
only if it then writes what the template renders, on conversations with a system text and without, of one turn and of
several, with blanks around the words and with nothing in them.

Only prompts are looked at, texts that end where an answer is to be generated: all their turns are history. How the last
answer of a training text is written may differ (a thinking block, another closing token) and is `turns.py`'s to find.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from lumen.errors import DataError
from lumen.page import ChatPage
from lumen.text.template import ChatTemplate

Pair = tuple[str, str]  # what stands before and after the words of a turn
Span = tuple[int, int]  # [start, end) in characters


@dataclass(frozen=True, kw_only=True)
class Turns:
    """A chat format as pairs around the words: the data behind masks and exported templates.

    begin           what opens every conversation, the BOS token's text included
    system          around the system text; None where the template knows no system turn
    system_in_user  the system text opens the first user turn, between `user[0]` and the user's words
    default_system  the system text of a conversation that has none; None where there is no system turn then
    user            around the user's words
    assistant       around the assistant's words, in a turn that is over
    prompt          what opens the turn that is to be generated; most often, but not always, `assistant[0]`
    trim            the roles whose words are stripped of blanks at both ends
    """

    begin: str
    system: Pair | None
    system_in_user: bool
    default_system: str | None
    user: Pair
    assistant: Pair
    prompt: str
    trim: frozenset[str]

    def write(self, messages: Sequence[dict]) -> str:
        """The prompt for the next answer, as the template writes it with `add_generation_prompt`."""
        return self.place(messages)[0] + self.prompt

    def place(self, messages: Sequence[dict]) -> tuple[str, list[Span]]:
        """The turns of `messages`, all over, as text, and where in it the words of each message stand."""
        text, spans = self.begin, []
        has_system = bool(messages) and messages[0]["role"] == "system"
        if not has_system and not self.system_in_user and self.default_system is not None:
            text += self.default_system.join(self.system)
        for number, message in enumerate(messages):
            role = message["role"]
            before, after = {"system": self.system, "user": self.user, "assistant": self.assistant}[role]
            if self.system_in_user and role == "system":
                before = self.user[0] + before
            elif self.system_in_user and has_system and number == 1:
                before = ""
            elif self.system_in_user and number == 0 and self.default_system is not None:
                before += self.default_system.join(self.system)
            words = message["content"].strip() if role in self.trim else message["content"]
            text += before
            spans.append((len(text), len(text) + len(words)))
            text += words + after
        return text, spans

    def fits(self, messages: Sequence[dict]) -> bool:
        """Whether the pairs can say these messages at all: plain text, a system turn at most in front."""
        roles = [message["role"] for message in messages]
        plain = all(
            message.keys() == {"role", "content"} and isinstance(message["content"], str) for message in messages
        )
        known = set(roles[1:]) <= {"user", "assistant"} and roles[:1] != ["assistant"]
        return plain and known and (roles[:1] != ["system"] or self.system is not None)


def write_jinja(page: ChatPage) -> str:
    """The turns of a page as a Jinja template, for a checkpoint that brings none of its own, or is to have another.

    A conversation whose turns the page cannot say (tools, a late system text where it opens the first question) is
    refused by the template itself.
    """
    if page.default_system is not None and page.system_in_user:
        return with_default_system(write_jinja(replace(page, default_system=None)), page.default_system)
    words = "message['content'] | trim" if page.trim else "message['content']"
    default = ""
    if page.default_system is not None:
        turn = _expression(page.system[0] + page.default_system + page.system[1])
        default = f"{{% if messages[0]['role'] != 'system' %}}{{{{ {turn} }}}}{{% endif %}}"
    turns = {"user": _user_turn(page, words), "assistant": _assistant_turn(page, words)}
    if page.system:
        turns = {"system": _system_turn(page, words), **turns}
    branches = "".join(
        f"{{% {'elif' if number else 'if'} message['role'] == '{role}' %}}{turn}"
        for number, (role, turn) in enumerate(turns.items())
    )
    return (
        f"{{{{ {_expression(page.begin)} }}}}{default}{{% for message in messages %}}{branches}"
        "{% else %}{{ raise_exception('no turn for the role ' + message['role']) }}{% endif %}{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ {_expression(opening(page))} }}}}{{% endif %}}"
    )


def opening(page: ChatPage) -> str:
    """What opens an answer that is to be generated."""
    return page.assistant[0] if page.prompt is None else page.prompt


def _system_turn(page: ChatPage, words: str) -> str:
    if page.system_in_user:
        return "{% if not loop.first %}{{ raise_exception('a system text stands first or nowhere') }}{% endif %}"
    return _turn(page.system[0], words, page.system[1])


def _user_turn(page: ChatPage, words: str) -> str:
    before, after = page.user
    if not page.system_in_user:
        return _turn(before, words, after)
    said = words.replace("message", "messages[0]", 1)
    system = _turn(page.system[0], said, page.system[1])
    first = "{% if loop.index0 == 1 and messages[0]['role'] == 'system' %}"
    return f"{{{{ {_expression(before)} }}}}{first}{system}{{% endif %}}{_turn('', words, after)}"


def _assistant_turn(page: ChatPage, words: str) -> str:
    before, after = page.assistant
    last = after if page.last_after is None else page.last_after
    if page.think:
        return _thinking_turn(page, words, last)
    if last == after:
        return _turn(before, words, after)
    end = f"({_expression(last)} if loop.last and not add_generation_prompt else {_expression(after)})"
    return f"{{{{ {_expression(before)} + ({words}) + {end} }}}}"


def _thinking_turn(page: ChatPage, words: str, last_after: str) -> str:
    """The turn of a format that thinks: thoughts open the last answer and are dropped from all others."""
    before, after = page.assistant
    begin, end = (_expression(mark.strip()) for mark in page.think)
    thoughts = f"{_expression(page.think[0])} + thoughts.strip('\\n') + {_expression(page.think[1])}"
    return (
        f"{{% set words = {words} %}}{{% set thoughts = message['reasoning_content'] | default('', true) %}}"
        f"{{% if {end} in words %}}{{% set thoughts = words.split({end})[0].split({begin})[-1] %}}"
        f"{{% set words = words.split({end})[-1].lstrip('\\n') %}}{{% endif %}}"
        "{% if loop.last and not add_generation_prompt %}"
        f"{{{{ {_expression(before)} + {thoughts} + words.lstrip('\\n') + {_expression(last_after)} }}}}"
        f"{{% else %}}{{{{ {_expression(before)} + words + {_expression(after)} }}}}{{% endif %}}"
    )


def _turn(before: str, words: str, after: str) -> str:
    return f"{{{{ {_expression(before)} + ({words}) + {_expression(after)} }}}}"


_PLACES = {"{bos}": "bos_token", "{eos}": "eos_token", "{today}": "strftime_now('%Y-%m-%d')"}


def _expression(text: str) -> str:
    """`text` as an expression of Jinja, the page's places in braces as what they stand for."""
    parts = [part for part in re.split("(" + "|".join(map(re.escape, _PLACES)) + ")", text) if part]
    return " + ".join(_PLACES.get(part) or json.dumps(part, ensure_ascii=False) for part in parts) or '""'


def with_default_system(source: str, system: str) -> str:
    """The Jinja template `source`, with `system` as the system text of a conversation that brings none."""
    turn = f"[{{'role': 'system', 'content': {json.dumps(system, ensure_ascii=False)}}}]"
    return (
        "{% if not messages or messages[0]['role'] not in ['system', 'developer'] %}"
        f"{{% set messages = {turn} + messages %}}{{% endif %}}{source}"
    )


def find_turns(template: ChatTemplate) -> Turns:
    """The turns of `template`, proven: on a set of conversations they write what the template renders.

    Raises DataError, saying what does not fit, where the template cannot be put into such pairs.
    """
    found = _found(template)
    if isinstance(found, DataError):
        raise DataError(str(found))
    return found


@lru_cache(maxsize=16)
def _found(template: ChatTemplate) -> Turns | DataError:
    """The turns or the reason against them: finding that out takes fifty renderings, so both are kept."""
    try:
        return _find(template)
    except DataError as refusal:
        return refusal


_NO_TURNS = "The chat template cannot be written as turns"


def _find(template: ChatTemplate) -> Turns:
    words = [sentinel(name) for name in ("u1", "a1", "u2", "a2", "u3")]
    talk = _talk(*words)
    opening, answer1, next1, answer2, next2, prompted = _cut(template, talk, words)
    if (answer1, next1) != (answer2, next2):
        first, second = f"{answer1!r} … {next1!r}", f"{answer2!r} … {next2!r}"
        raise DataError(f"{_NO_TURNS}: its first answer stands in {first}, its second in {second}.")
    user_after = _closing(template, talk, prompted)
    if user_after is None or not answer1.startswith(user_after):
        raise DataError(
            f"{_NO_TURNS}: a user's turn ends in {prompted!r} before a prompt, in {answer1!r} before an answer."
        )
    # Where an answer ends otherwise when nothing follows, it is taken to end as a user's turn does.
    endings = [_closing(template, talk[:2], next1), user_after]
    endings = [end for end in endings if end is not None and next1.startswith(end)]
    user_before, assistant_after, first = _first_turn(template, opening, next1, endings)
    turns = Turns(
        **first,
        user=(user_before, user_after),
        assistant=(answer1.removeprefix(user_after), assistant_after),
        prompt=prompted.removeprefix(user_after),
        trim=_trimmed(template),
    )
    turns = _with_system(turns, template)
    _prove(turns, template)
    return turns


def _first_turn(template: ChatTemplate, opening: str, next1: str, endings: list[str]) -> tuple[str, str, dict]:
    """What opens a user's turn, what closes an assistant's, and what else stands before the first user's words.

    opening  all before the first user's words; next1  all between an answer and the next user's words
    endings  what may close an answer
    """
    for end in endings:
        if opening.endswith(user_before := next1[len(end) :]):
            begin = opening.removesuffix(user_before)
            return user_before, end, {"begin": begin, "system": None, "system_in_user": False, "default_system": None}
    # A system text that nobody gave may stand in the first user's turn.
    said, asked = sentinel("system"), sentinel("user")
    try:
        before, between, _ = _cut(template, [{"role": "system", "content": said}, *_talk(asked)], [said, asked])
    except DataError:
        before = between = opening  # which no opening consists of
    default = opening[len(before) : len(opening) - len(between)]
    for end in endings:
        begin, user_before, inside = before.partition(next1[len(end) :] or sentinel("none"))
        if user_before and opening == before + default + between:
            system = {"system": (inside, between), "system_in_user": True, "default_system": default}
            return user_before, end, {"begin": begin, **system}
    raise DataError(f"{_NO_TURNS}: the first turn opens with {opening!r}, a later one with {next1!r}.")


def _closing(template: ChatTemplate, messages: list[dict], followed: str) -> str | None:
    """What closes the last turn: what stands after it where nothing follows, if `followed` begins with it, too.

    Some templates end a text that is not a prompt with the EOS token, which then belongs to no turn.
    """
    text = template.render(messages).rpartition(messages[-1]["content"])[2]
    return next((end for end in (text, text.removesuffix(template.eos_token)) if followed.startswith(end)), None)


def sentinel(name: str) -> str:
    """A word of private-use characters and letters that no template changes and no conversation holds."""
    return f"\ue000{name}\ue001"


def _talk(*contents: str) -> list[dict]:
    """Messages of user and assistant by turns, the user first."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def _cut(template: ChatTemplate, messages: list[dict], sentinels: list[str]) -> list[str]:
    """The prompt's text around the sentinels, which must each stand once and in this order."""
    text = template.render(messages, add_generation_prompt=True)
    parts = re.split("|".join(map(re.escape, sentinels)), text)
    found = re.findall("|".join(map(re.escape, sentinels)), text)
    if found != sentinels:
        raise DataError(f"{_NO_TURNS}: it does not write every message once and in order.")
    return parts


def _trimmed(template: ChatTemplate) -> frozenset[str]:
    """The roles whose words lose the blanks at both ends."""
    trimmed = set()
    inner = {"user": sentinel("user"), "assistant": sentinel("assistant")}
    text = template.render(_talk(*(f"  {word}\n " for word in inner.values()), "-"), add_generation_prompt=True)
    for role, word in inner.items():
        if f"  {word}\n " not in text:
            trimmed.add(role)
    return frozenset(trimmed)


def _with_system(turns: Turns, template: ChatTemplate) -> Turns:
    """`turns` with the place of the system text, or as they are where the template refuses one."""
    said, asked = sentinel("system"), sentinel("user")
    messages = [{"role": "system", "content": said}, *_talk(asked)]
    padded = [{"role": "system", "content": f"  {said}\n "}, *_talk(asked)]
    try:
        text = template.render(padded, add_generation_prompt=True)
    except DataError:
        return turns  # the template's own refusal: it knows no system turn
    trim = turns.trim if f"  {said}\n " in text else turns.trim | {"system"}
    if turns.system is not None:
        return replace(turns, trim=trim)
    before, between, _ = _cut(template, messages, [said, asked])
    begin, opening = turns.begin, turns.user[0]
    if before.startswith(begin + opening) and not between.endswith(opening):
        pair = (before.removeprefix(begin + opening), between)
        return replace(turns, system=pair, system_in_user=True, trim=trim)
    after = between.removesuffix(opening)
    if before.startswith(begin) and between.endswith(opening):
        return replace(turns, system=(before.removeprefix(begin), after), trim=trim)
    if begin.startswith(before) and begin.endswith(after) and len(before + after) <= len(begin):
        # There is a system turn without a system text, too: it says what stands in its place.
        default = begin[len(before) : len(begin) - len(after)]
        begin = template.bos_token if before.startswith(template.bos_token) else ""
        return replace(
            turns, begin=begin, system=(before.removeprefix(begin), after), default_system=default, trim=trim
        )
    raise DataError(f"{_NO_TURNS}: it begins with {begin!r}, but with {before!r} … {between!r} around a system text.")


def _prove(turns: Turns, template: ChatTemplate) -> None:
    """DataError unless `turns` write what the template does, of all that the template does not itself refuse."""
    system = {"role": "system", "content": "Be brief."}
    for talk in (
        _talk("one?"),
        _talk("one?", "1", "two?"),
        _talk("one?", "1", "two?", "2", "three?"),
        _talk("  one\n\n?\n ", "\n 1\n\n2 ", "\ttwo? "),
        _talk("one?", "1", ""),
        _talk("one?", "", "two?"),
    ):
        for messages in (talk, [system, *talk], [{**system, "content": " \nBe\n\nbrief. \n"}, *talk]):
            try:
                wanted = template.render(messages, add_generation_prompt=True)
            except DataError:
                continue
            _compare(wanted, turns.write(messages), messages)


def _compare(wanted: str, found: str, messages: list[dict]) -> None:
    if wanted != found:
        at = shared_length(wanted, found)
        contents = [message["content"] for message in messages]
        raise DataError(
            f"{_NO_TURNS}: of {contents} it makes {wanted[at : at + 40]!r} after {wanted[max(0, at - 40) : at]!r}, "
            f"where the turns found in it have {found[at : at + 40]!r}."
        )


def shared_length(a: str, b: str) -> int:
    """How many characters `a` and `b` have in common at their beginning."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return low
