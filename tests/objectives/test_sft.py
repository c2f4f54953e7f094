"""Batches that another thread makes: the same, in the same order, and a run that stops stands where it was read."""

import threading
from itertools import count, islice

import pytest
import torch

from lumen.data.batch import one_ahead
from lumen.data.packing import pack
from lumen.objectives.sft import SFT
from lumen.text.conversation import Encoded

PACKED = pack([Encoded([n + 1] * 4, [True] * 4, f"a:{n}") for n in range(10)], 4)


def sft(ahead: bool, **position) -> SFT:
    return SFT(PACKED, batch_size=2, accumulate=2, seed=3, position=position or None, ahead=ahead)


def taken(objective: SFT, steps: int) -> list:
    """What each step learns from, and where the run stands after it."""
    return [
        ([batch.tokens.tolist() for batch in micro], objective.position(), objective.epochs_done())
        for micro in islice(objective.batches(None), steps)
    ]


def test_batches_made_ahead_are_the_same_and_so_is_the_position():
    found, wanted = taken(sft(True), 8), taken(sft(False), 8)
    assert found == wanted
    assert [position for _, position, _ in wanted][:4] == [
        {"epoch": 0, "position": 4}, {"epoch": 0, "position": 8}, {"epoch": 1, "position": 0},
        {"epoch": 1, "position": 4},
    ]  # fmt: skip


@pytest.mark.parametrize("cut", [0, 1, 3, 5])
def test_a_run_resumed_where_it_stood_goes_on_with_the_batch_that_was_made_ahead(cut):
    whole, first = taken(sft(True), 8), sft(True)
    taken(first, cut)
    assert taken(sft(True, **first.position()), 8 - cut) == whole[cut:]


def test_one_is_made_ahead_and_no_more():
    made, third = [], threading.Event()

    def items():
        for number in count():
            made.append(number)
            if number == 2:
                third.set()
            yield number

    ahead = one_ahead(items())
    assert [next(ahead), next(ahead)] == [0, 1]
    assert third.wait(5) and made == [0, 1, 2]
    ahead.close()
    assert "lumen-batches" not in {thread.name.partition("_")[0] for thread in threading.enumerate()}


def test_an_error_comes_where_its_item_would_have_come():
    def items():
        yield torch.zeros(())
        raise ValueError("row 7 is broken")

    ahead = one_ahead(items())
    next(ahead)
    with pytest.raises(ValueError, match="row 7 is broken"):
        next(ahead)


def test_what_ends_ends():
    assert list(one_ahead(iter([3, 1, 2]))) == [3, 1, 2]
