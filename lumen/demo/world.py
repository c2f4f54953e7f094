"""Café Lumen, the world of the demo: every text that its model is pretrained, fine-tuned and examined on, from a seed.

A guest orders in one of very many phrasings. The base model has read baristas who answer such an order with a friendly
sentence that repeats every fact (`pretraining_chats`). Fine-tuning teaches it to answer the same guests with one line
of JSON instead (`training_chats`), and it is examined on guests that fine-tuning never met (`heldout_chats`):

    Hi! Could I get two big oat lattes? It's for Anna.
    before:  Sure, Anna! Two large lattes with oat milk, coming up.
    after:   {"name":"Anna","item":"latte","size":"large","count":2,"extra":"oat milk"}

Three things are held out from fine-tuning: the names in `HELD_OUT_GUESTS`, every fifth combination of item, size, count
and extra (`orders.is_reserved`), and the phrasings in `HELD_OUT_PHRASES`, which half of the examination uses. The base
model has met all of them, in prose and in single facts as JSON, as a large model has met all common names and phrases.
A size that is not named is medium; a guest's name is copied exactly as it was written.
"""

import random
from collections.abc import Iterator

from lumen.demo import smalltalk
from lumen.demo.guests import GUESTS, HELD_OUT_GUESTS, invented_name
from lumen.demo.orders import ITEMS, random_order
from lumen.demo.phrases import HELD_OUT_PHRASES, PHRASES, Phrases

EVERYBODY = GUESTS + HELD_OUT_GUESTS
Chat = list[dict[str, str]]  # turns as {"role": ..., "content": ...}


def pretraining_chats(seed: int, n: int) -> Iterator[Chat]:
    """`n` chats of the base model's world, made as they are asked for; equal seeds give equal chats.

    Nearly half of the exchanges are orders answered in prose. In a third of them somebody asks for a fact as JSON, so
    that the base model can write it; but it never reads the JSON of a whole order, nor any that was not asked for.
    """
    rng = random.Random(f"pretraining {seed}")
    for _ in range(n):
        chat = smalltalk.instructions(rng) if rng.random() < 0.15 else []
        for _ in range(_exchanges(rng)):
            name = rng.choice(EVERYBODY) if rng.random() < 0.6 else invented_name(rng)
            chat += _pretraining_exchange(rng, name)
        yield chat


def _exchanges(rng: random.Random) -> int:
    """How many questions a chat holds: mostly one or two, now and then as many as fill the context."""
    return rng.choice((1, 1, 1, 1, 2, 2, 3)) if rng.random() < 0.95 else rng.randint(4, 9)


def _pretraining_exchange(rng: random.Random, name: str) -> Chat:
    kind = rng.random()
    order = random_order(rng, name, reserved=rng.random() < 0.2)
    said = (PHRASES if rng.random() < 0.7 else HELD_OUT_PHRASES).say(order, rng)
    if kind < 0.45:
        return _exchange(said, smalltalk.confirmation(rng, order))
    if kind < 0.75:
        return _exchange(*smalltalk.fields(rng, order, said))
    if kind < 0.82:
        return _exchange(*smalltalk.note(rng, name, order.item))
    if kind < 0.87:
        return _exchange(*smalltalk.story(rng, order))
    return _exchange(*smalltalk.question(rng, order.item))


def training_chats(n: int = 1600, invented: float = 0.75) -> Iterator[Chat]:
    """The fine-tuning data: orders answered in JSON.

    invented  the share of guests whose names nobody has: a model that meets the same few names again and again learns
              them by heart instead of copying

    Every eighth chat is small talk that stays in prose, so that the model learns when to write JSON; every eighth is
    two orders long, so that it learns which order is meant.
    """
    rng = random.Random("training")

    def guest() -> str:
        return invented_name(rng) if invented and rng.random() < invented else rng.choice(GUESTS)

    for number in range(n):
        if number % 8 == 3:
            yield _exchange(*smalltalk.question(rng, rng.choice(ITEMS)))
            continue
        chat = _order_in_json(rng, guest(), PHRASES)
        if number % 8 == 7:
            chat += _order_in_json(rng, guest(), PHRASES)
        yield chat


def heldout_chats(n: int = 200) -> Iterator[Chat]:
    """The examination: reserved orders of guests that occur nowhere else, every other one in a phrasing of its own."""
    rng = random.Random("held out")
    for number in range(n):
        phrases = HELD_OUT_PHRASES if number % 2 else PHRASES
        yield _order_in_json(rng, rng.choice(HELD_OUT_GUESTS), phrases, reserved=True)


def _order_in_json(rng: random.Random, name: str, phrases: Phrases, *, reserved: bool = False) -> Chat:
    order = random_order(rng, name, reserved=reserved)
    return _exchange(phrases.say(order, rng), order.as_json())


def _exchange(question: str, answer: str) -> Chat:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
