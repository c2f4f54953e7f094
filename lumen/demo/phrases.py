"""How a guest says an order: a grammar of many thousand sentences, and another that only the examination speaks."""

import random
from dataclasses import dataclass

from lumen.demo.orders import MILKS, NUMBERS, SYRUPS, Order

_SIZE_WORDS = {
    "small": ("small", "small", "little"),
    "medium": ("medium", "regular", ""),  # nothing said means medium
    "large": ("large", "large", "big"),
}
_SIZE_LATER = ("make {it} {size}, please.", "in {size}, if you can.", "the {size} size, please.")
_EXTRA_LATER = ("with {extra}, please.", "and {extra} in {it}, please.", "oh, and please add {extra}.")
_EXTRA_AFTER = (" with {}", " with {}", " with {}", " with some {}", " plus {}", " ({})")
_EXTRA_FIRST = ("latte", "cappuccino", "flat white", "cortado", "mocha", "chai latte", "matcha latte", "iced coffee")


@dataclass(frozen=True, kw_only=True)
class Phrases:
    """The pieces of an order: {wish} is `two big oat lattes`, {Wish} the same with a capital, {name} the guest."""

    openers: tuple[str, ...]  # may stand before the order
    closers: tuple[str, ...]  # may stand after it
    whole: tuple[str, ...]  # sentences that say both the wish and the name
    wishes: tuple[str, ...]  # sentences that say the wish ...
    names: tuple[str, ...]  # ... and those that say the name, in either order

    def say(self, order: Order, rng: random.Random) -> str:
        """One of very many ways to order it: every fact is said, except that a medium size may go without saying."""
        wish, later = _wish(order, rng)
        facts = {"wish": wish, "Wish": sentence_case(wish), "name": order.name}
        sentences = [piece.format(**facts) for piece in self._core(rng)] + later
        if rng.random() < 0.4:
            sentences.insert(0, rng.choice(self.openers))
        if rng.random() < 0.25:
            sentences.append(rng.choice(self.closers))
        if rng.random() < 0.1:  # in a hurry: no capitals, no full stop
            return " ".join(sentences).rstrip(".!")
        return " ".join(map(sentence_case, sentences))

    def _core(self, rng: random.Random) -> tuple[str, ...]:
        """The one sentence that says everything, or the two that say it together."""
        if rng.random() < 0.5:
            return (rng.choice(self.whole),)
        wish, name = rng.choice(self.wishes), rng.choice(self.names)
        return (name, wish) if rng.random() < 0.3 else (wish, name)


def sentence_case(text: str) -> str:
    """`text` with a capital first letter and the rest as it is."""
    return text[0].upper() + text[1:]


PHRASES = Phrases(
    openers=(
        "hi!", "hello!", "hey there!", "good morning!", "good afternoon!", "hello, hello!", "hi, me again!",
        "oh, it smells good here.", "what a cosy place!", "it's raining cats and dogs!", "brr, it's cold outside.",
        "lovely music today!", "I'm in a bit of a hurry.", "no rush at all.", "my favourite café!", "finally, a break!",
        "we just arrived.", "it's our first time here.", "I found a table by the window.", "excuse me!",
        "so many nice things on the menu!", "hmm, let me think.", "okay, we are ready.",
    ),
    closers=(
        "thanks!", "thank you!", "thank you so much!", "that's all.", "nothing else, thanks.", "you're the best!",
        "take your time.", "to go, please.", "we'll sit outside.", "I can't wait!", "I'll pay by card.", "cheers!",
    ),
    whole=(
        "{wish} for {name}, please.", "{wish} for {name}.", "{wish} for {name}!", "could I get {wish} for {name}?",
        "can I have {wish} for {name}, please?", "I'd like {wish} for {name}.", "I would love {wish} for {name}.",
        "{name} here. {Wish}, please!", "{name} would like {wish}.", "{name} wants {wish}, please.",
        "my friend {name} would like {wish}.", "I'm {name} and I'd like {wish}.", "I'm {name}, can I get {wish}?",
        "this is {name}, could you make {wish}?", "an order for {name}: {wish}.", "for {name}: {wish}.",
        "for {name}, {wish}, please.", "{name} asked me to bring {wish}.", "we need {wish}, and the name is {name}.",
        "please make {wish} for my neighbour {name}.", "{wish}, and please call {name}.",
        "{name} is dreaming of {wish}.", "may I order {wish} for {name}?", "put {wish} on the list for {name}, please.",
        "it's {name}'s birthday, so {wish}, please!", "{wish}, the name's {name}.", "get {name} {wish}, please.",
    ),
    wishes=(
        "I'd like {wish}, please.", "I'd like {wish}.", "could I get {wish}?", "can I have {wish}, please?",
        "can we get {wish}?", "{wish}, please.", "{wish}, please!", "just {wish} today.", "I'll have {wish}.",
        "I'll take {wish}, please.", "I need {wish}.", "may I have {wish}?", "we would like {wish}.",
        "do you have {wish}?", "how about {wish}?", "today it's {wish} for me.", "I was thinking of {wish}.",
        "let's do {wish}.", "nothing beats {wish}!", "please make me {wish}.",
    ),
    names=(
        "it's for {name}.", "the name is {name}.", "my name is {name}.", "I'm {name}.", "for {name}, please.",
        "{name} is my name.", 'please write "{name}" on the cup.', 'put "{name}" on it, please.',
        "the order is for {name}.", "name: {name}.", "call me {name}.", "{name} is waiting outside.",
        "{name} will pick it up.", "it's a treat for {name}.", "everybody calls me {name}.",
        "that's for my friend {name}.", "you can call out {name}.", "I'm ordering for {name}.", "{name} sends me.",
    ),
)  # fmt: skip

HELD_OUT_PHRASES = Phrases(
    openers=(
        "good evening!", "what a day!", "hi, how are you?", "the garden looks beautiful.", "sorry, I'm a little late.",
    ),
    closers=("have a nice day!", "that would be great.", "I'll wait here.", "thanks a lot!"),
    whole=(
        "would you make {wish} for {name}, please?", "{name} will have {wish}.", "bring {name} {wish}, please.",
        "let me get {wish} for my cousin {name}.", "I'm here for {name}, who wants {wish}.",
        "{wish} under the name {name}, please.",
    ),
    wishes=("might I have {wish}?", "give me {wish}, please.", "I could really use {wish}.", "we'll take {wish}."),
    names=("that's for {name}.", "{name} is the name.", "they call me {name}.", "it goes to {name}."),
)  # fmt: skip


def _wish(order: Order, rng: random.Random) -> tuple[str, list[str]]:
    """The order as a noun phrase without the name, and the sentences that add what the phrase left out."""
    size, extra = rng.choice(_SIZE_WORDS[order.size]), order.extra
    it = "it" if order.count == 1 else "them"
    later = []
    if size and rng.random() < 0.12:
        later.append(rng.choice(_SIZE_LATER).format(it=it, size=order.size))
        size = ""
    if extra and rng.random() < 0.12:
        later.append(rng.choice(_EXTRA_LATER).format(it=it, extra=extra))
        extra = None
    before, after = _place_extra(order.item, extra, rng) if extra else ("", "")
    if size and rng.random() < 0.1:
        size, after = "", f" ({size}){after}"
    thing = " ".join(word for word in (size, before, order.noun) if word)
    return f"{_count(order.count, thing, rng)} {thing}{after}", later


def _place_extra(item: str, extra: str, rng: random.Random) -> tuple[str, str]:
    """What the extra puts before the noun, `oat`, and what after it, ` with some oat milk`; one of them is empty."""
    if item in _EXTRA_FIRST and extra in MILKS + SYRUPS and rng.random() < 0.5:
        return (extra.removesuffix(" milk") if rng.random() < 0.7 else extra), ""
    return "", rng.choice(_EXTRA_AFTER).format(extra)


def _count(count: int, thing: str, rng: random.Random) -> str:
    """The number before `thing`: `an`, `one`, `2`, `a couple of`, `half a dozen`."""
    if count == 1:
        return rng.choice(("an" if thing[0] in "aeiou" else "a",) * 4 + ("one", "1"))
    if count == 2 and rng.random() < 0.15:
        return rng.choice(("a couple of", "a pair of"))
    if count == 6 and rng.random() < 0.15:
        return "half a dozen"
    return NUMBERS[count] if rng.random() < 0.6 else str(count)
