"""Every token once, targets inside documents, rows that are full, and a stream that continues where it was left."""

from itertools import chain, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lumen.data.batch import RowStream, batches, stack
from lumen.data.packing import pack
from lumen.errors import DataError
from lumen.text.conversation import Encoded


def example(*ids, learn=None):
    return Encoded(ids=list(ids), learn=[True] * len(ids) if learn is None else learn)


def examples(sizes):
    """Examples of these sizes whose ids are all different."""
    start, made = 1, []
    for size in sizes:
        made.append(example(*range(start, start + size)))
        start += size
    return made


def lengths(packed):
    return [sum(len(item.ids) for item in row) for row in packed.rows]


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 16), min_size=1, max_size=60), packing=st.booleans())
def test_every_example_is_in_one_row_whole_and_no_row_is_too_long(sizes, packing):
    given_examples = examples([2, *sizes])
    packed = pack(given_examples, 16, packing=packing)
    in_rows = [item.ids for row in packed.rows for item in row]
    assert sorted(in_rows) == [item.ids for item in given_examples]
    assert max(lengths(packed)) <= 16
    assert (packed.examples, packed.tokens) == (len(given_examples), 2 + sum(sizes))
    assert packed.truncated == packed.dropped == 0


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 16), min_size=1, max_size=60))
def test_no_two_rows_could_be_one(sizes):
    rooms = sorted(16 - filled for filled in lengths(pack(examples([2, *sizes]), 16)))
    assert all(16 - a > b for a, b in pairwise(rooms))


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=20), seed=st.integers(0, 9))
def test_each_target_is_the_next_learned_token_of_its_own_document(sizes, seed):
    random = torch.Generator().manual_seed(seed)
    given_examples = [
        Encoded(ids=item.ids, learn=torch.randint(0, 2, (len(item.ids),), generator=random).bool().tolist())
        for item in [*examples(sizes), example(900, 901)]
    ]
    given_examples[-1] = example(900, 901)  # something is learned
    learned = {
        (item.ids[i], item.ids[i + 1]) for item in given_examples for i in range(len(item.ids) - 1) if item.learn[i + 1]
    }
    packed = pack(given_examples, 12)
    batch = stack(packed.rows)
    counted = batch.target != -100
    assert set(zip(batch.tokens[counted].tolist(), batch.target[counted].tolist(), strict=True)) == learned
    assert batch.counted == packed.counted == len(learned)
    assert batch.filled == packed.tokens


def test_positions_restart_and_documents_are_numbered_within_each_row():
    rows = [[example(11, 12, 13), example(21, 22)], [example(31), example(41, 42, learn=[True, False])]]
    batch = stack(rows)
    assert batch.tokens.tolist() == [[11, 12, 13, 21, 22], [31, 41, 42, 0, 0]]
    assert batch.target.tolist() == [[12, 13, -100, 22, -100], [-100] * 5]
    assert batch.position.tolist() == [[0, 1, 2, 0, 1], [0, 0, 1, 0, 0]]
    assert batch.document.tolist() == [[0, 0, 0, 1, 1], [0, 1, 1, -1, -1]]
    assert {tensor.dtype for tensor in vars(batch).values() if isinstance(tensor, torch.Tensor)} == {torch.int64}


def test_a_batch_that_was_moved_is_whole_and_names_its_sources():
    batch = stack([[Encoded([1, 2], [True, True], "a.jsonl:7")], [example(3), Encoded([4], [True], "b.txt")]])
    moved = batch.to("meta")
    assert moved.sources == batch.sources == ("a.jsonl:7", "", "b.txt")
    assert {tensor.device.type for tensor in (moved.tokens, moved.target, moved.position, moved.document)} == {"meta"}


def test_equal_examples_give_equal_rows():
    sizes = torch.randint(1, 60, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    assert pack(examples(sizes), 64) == pack(examples(sizes), 64)


def test_rows_of_short_examples_are_nearly_full():
    sizes = torch.randint(10, 400, (2000,), generator=torch.Generator().manual_seed(0)).tolist()
    assert pack(examples(sizes), 2048).efficiency > 0.995
    assert pack(examples(sizes), 2048, packing=False).efficiency == pytest.approx(sum(sizes) / (2000 * 2048))


def test_without_packing_examples_stay_alone_and_in_order():
    given_examples = examples([3, 9, 1])
    assert [list(row) for row in pack(given_examples, 9, packing=False).rows] == [[item] for item in given_examples]


def test_a_too_long_example_is_refused_by_place_and_length():
    with pytest.raises(DataError, match=r"example 2 of 3: 9 tokens, but data\.max_length is 8.*data\.too_long"):
        pack(examples([3, 9, 1]), 8)
    with pytest.raises(DataError, match=r"^a\.jsonl:7: 9 tokens"):
        pack([Encoded([1] * 9, [True] * 9, "a.jsonl:7")], 8)


def test_a_truncated_example_keeps_its_beginning():
    packed = pack(examples([3, 9, 1]), 4, too_long="truncate", packing=False)
    assert [row[0].ids for row in packed.rows] == [[1, 2, 3], [4, 5, 6, 7], [13]]
    assert (packed.truncated, packed.dropped) == (1, 0)


def test_a_truncated_example_with_nothing_left_to_learn_is_dropped():
    late = example(1, 2, 3, 4, 5, learn=[True, False, False, False, True])
    packed = pack([late, example(6, 7)], 4, too_long="truncate")
    assert [row[0].ids for row in packed.rows] == [[6, 7]]
    assert (packed.truncated, packed.dropped) == (0, 1)


def test_dropped_examples_are_counted():
    packed = pack(examples([3, 9, 1, 10]), 4, too_long="drop")
    assert (packed.examples, packed.truncated, packed.dropped) == (2, 0, 2)


def test_no_examples_are_refused():
    with pytest.raises(DataError, match="empty"):
        pack([], 8)


@pytest.mark.parametrize("learn", [[False, False], [True, False]])
def test_a_data_set_that_teaches_nothing_is_refused(learn):
    with pytest.raises(DataError, match=r"Nothing is learned in any of the 2 examples.*data\.train_on"):
        pack([example(1, 2, learn=learn)] * 2, 8)


def test_batches_hold_all_rows_in_order_and_the_last_is_smaller():
    rows = pack(examples([4] * 7), 4).rows
    made = list(batches(rows, 3))
    assert [len(batch.tokens) for batch in made] == [3, 3, 1]
    assert torch.equal(torch.cat([batch.tokens for batch in made]), stack(rows).tokens)


def take_all(stream, count, times):
    return [[row[0].ids[0] for row in stream.take(count)] for _ in range(times)]


def test_an_epoch_gives_every_row_once_and_ends_with_what_is_left():
    rows = pack(examples([4] * 10), 4).rows
    taken = take_all(RowStream(rows, seed=3), 4, 6)
    assert [len(step) for step in taken] == [4, 4, 2, 4, 4, 2]
    for epoch in (taken[:3], taken[3:]):
        assert sorted(chain(*epoch)) == sorted(row[0].ids[0] for row in rows)


def test_epochs_and_seeds_differ_in_their_order():
    rows = pack(examples([4] * 50), 4).rows
    orders = [tuple(take_all(RowStream(rows, seed=seed, epoch=epoch), 50, 1)[0]) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4


@pytest.mark.parametrize("steps", range(8))
def test_a_stream_that_starts_in_the_middle_continues_the_same_sequence(steps):
    rows = pack(examples([4] * 10), 4).rows
    stream = RowStream(rows, seed=3)
    take_all(stream, 4, steps)
    resumed = RowStream(rows, seed=3, epoch=stream.epoch, position=stream.position)
    assert take_all(resumed, 4, 5) == take_all(stream, 4, 5)


def test_splitting_a_step_into_micro_batches_takes_the_same_rows():
    rows = pack(examples([4] * 10), 4).rows
    one_by_one, at_once = RowStream(rows, seed=5), RowStream(rows, seed=5)
    for _ in range(4):
        small = [batch.tokens for batch in batches(one_by_one.take(8), 1)]
        assert torch.equal(torch.cat(small), stack(at_once.take(8)).tokens)


def test_a_position_behind_the_last_row_is_refused():
    with pytest.raises(DataError, match=r"row 10 of epoch 2, but the data has 10 rows"):
        RowStream(pack(examples([4] * 10), 4).rows, seed=0, epoch=2, position=10)


def test_a_stream_of_no_rows_is_refused():
    with pytest.raises(DataError, match="no rows"):
        RowStream([], seed=0)


def test_a_split_document_keeps_every_token_in_its_order():
    long = Encoded(ids=list(range(1, 24)), learn=[True] * 23, source="book.txt:1")
    packed = pack([long], 10, too_long="split")
    pieces = sorted((piece.ids for row in packed.rows for piece in row), key=lambda ids: ids[0])
    assert all(before[-1] == after[0] for before, after in pairwise(pieces))
    pieces = [pieces[0], *(piece[1:] for piece in pieces[1:])]
    assert [id for piece in pieces for id in piece] == long.ids
    assert (packed.truncated, packed.dropped, packed.examples) == (1, 0, 3)


def test_an_example_that_is_too_long_is_named_by_its_file_and_line():
    with pytest.raises(DataError, match=r"book\.txt:1: 23 tokens, but data\.max_length is 10"):
        pack([Encoded(ids=list(range(23)), learn=[True] * 23, source="book.txt:1")], 10)
