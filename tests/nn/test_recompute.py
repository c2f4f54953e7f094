"""What blocks keep: which choice fits how much memory, and what is moved to the host and comes back."""

import weakref
from contextlib import nullcontext

import pytest
import torch

from lumen import ops
from lumen.errors import KernelError
from lumen.nn import recompute
from lumen.nn.recompute import (
    KEEP_ALL,
    LEAST_MOVED,
    MOST_IN_PIECE,
    ON_THE_WAY,
    Keeping,
    Mover,
    bytes_per_token,
    choose_keeping,
    piece_sizes,
    recomputed,
)
from lumen.spec import Family

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "rope_scaling": {"rope_type": "default"},
}
SPEC = Family.load("llama3").bind(LLAMA_8B)
TOKENS = 8192


def cost(level):
    return bytes_per_token(SPEC, level) * TOKENS


def on_device(keepings):
    moved = next((cost(keeping.level) for keeping in keepings if keeping.moved), 0)
    return ON_THE_WAY * moved + sum(cost(keeping.level) for keeping in keepings if not keeping.moved)


def choose(room_bytes, **options):
    return choose_keeping({level: cost(level) for level in ("all", "attention", "input")}, 32, room_bytes, **options)


def test_a_block_of_llama_8b_keeps_92_kilobytes_a_token():
    assert bytes_per_token(SPEC, "all") == 92 * 1024
    assert bytes_per_token(SPEC, "attention") == 36 * 1024
    assert bytes_per_token(SPEC, "input") == 8 * 1024


def test_all_is_kept_where_it_fits():
    assert choose(32 * cost("all"), host_bytes=2**50) == (KEEP_ALL,) * 32


def test_a_little_less_room_makes_few_blocks_compute_their_mlp_again():
    chosen = choose(32 * cost("all") - 1, host_bytes=2**50)
    assert chosen == (Keeping("attention"),) + (KEEP_ALL,) * 31


def test_much_less_room_moves_what_attention_made_to_the_host():
    chosen = choose(2 * cost("attention"), host_bytes=2**50)
    assert set(chosen) == {Keeping("attention", moved=True)}


def test_hardly_any_room_keeps_inputs_alone():
    assert set(choose(0, host_bytes=2**50)) == {Keeping("input", moved=True)}
    assert set(choose(0, host_bytes=0)) == {Keeping("input")}


def test_what_the_hosts_memory_cannot_hold_is_not_moved():
    room = 2 * cost("attention")
    for level, instead in (("attention", Keeping("input", moved=True)), ("input", Keeping("input"))):
        moved = choose(room, host_bytes=32 * cost(level))
        less = choose(room, host_bytes=sum(each.moved for each in moved) * cost(level) - 1)
        assert Keeping(level, moved=True) in moved and Keeping(level, moved=True) not in less and instead in less


def test_what_is_wanted_once_is_left_free_where_a_block_keeps_all():
    room, once = 32 * cost("all"), cost("all")
    assert choose(room + once, host_bytes=0, once_bytes=once) == (KEEP_ALL,) * 32
    assert on_device(choose(room, host_bytes=0, once_bytes=once)) <= room - once


@pytest.mark.parametrize("host_bytes", [0, 2**50])
@pytest.mark.parametrize("share", [0.95, 0.7, 0.5, 0.35, 0.2])
def test_the_choice_fits_the_room(share, host_bytes):
    room = int(share * 32 * cost("all"))
    chosen = choose(room, host_bytes=host_bytes)
    assert len(chosen) == 32 and on_device(chosen) <= room
    assert list(chosen) == sorted(chosen, key=lambda keeping: keeping == KEEP_ALL)  # the last blocks keep all


# --- moving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [LEAST_MOVED, LEAST_MOVED + 1, 3 * LEAST_MOVED - 1, MOST_IN_PIECE - 1, MOST_IN_PIECE,
                                  350_000 * 4096 * 2])  # fmt: skip
def test_pinned_memory_is_taken_in_powers_of_two_and_none_is_wasted(size):
    pieces = piece_sizes(size)
    assert size <= sum(pieces) < size + LEAST_MOVED
    assert all(piece & piece - 1 == 0 and LEAST_MOVED <= piece <= MOST_IN_PIECE for piece in pieces)
    assert sum(pieces[:-1]) < size  # only the last is not full


class Stream:
    """Does at once what it is asked, and notes the copies that it has waited for."""

    def __init__(self, device=None):
        self.waited = set()

    def wait_stream(self, other):
        pass

    def wait_event(self, event):
        self.waited.add(event)

    def record_event(self):
        return Event()


class Event:
    def record(self, stream):
        pass


@pytest.fixture
def mover(monkeypatch):
    """One for the CPU; `held` is how many blocks had memory on the device whenever more was taken."""
    main, empty = Stream(), torch.empty

    def noted(*shape, pin_memory=False, **options):
        if options.get("dtype") == torch.uint8 and shape != (0,):
            (found.pinned if pin_memory else found.held).append(shape[0] if pin_memory else 1 + held(found))
        return empty(*shape, **options)

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch, "empty", noted)
    found = Mover(torch.device("cpu"))
    found.main, found.held, found.pinned = main, [], []
    return found


def held(mover):
    return sum(any(part.device is not None for part in shipment.values()) for shipment in mover._sent)


def passed(mover, width=600_001, blocks=5):
    """The output of some blocks that keep their inputs, moved; what they learn; how many are held while each runs."""
    source = torch.Generator().manual_seed(0)
    weights = [torch.randn(width, generator=source).requires_grad_() for _ in range(blocks)]
    x, running = weights[0] * 1, []

    def block(x, weight):
        running.append(held(mover) if mover else 0)
        return (x * weight).sin()

    if mover:
        mover.start()
    for weight in weights:
        with mover.block(x) if mover else nullcontext():
            x = recomputed(block, x, weight)
    return x.sum(), weights, running


def test_what_was_moved_comes_back_and_gives_the_same_gradients_again_and_again(mover):
    total, weights, _ = passed(None)
    wanted = torch.autograd.grad(total, weights)
    for _ in range(2):
        total, weights, _ = passed(mover)
        for again in (True, False):
            found = torch.autograd.grad(total, weights, retain_graph=again)
            assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert mover.pinned == 5 * piece_sizes(4 * 600_001)  # once, for both passes


def test_a_blocks_input_is_moved_also_where_it_has_no_history(mover):
    x, weight = torch.randn(600_001), torch.randn(600_001, requires_grad=True)
    mover.start()
    with mover.block(x):
        y = recomputed(torch.mul, x, weight)
    assert mover.pinned == piece_sizes(x.nbytes)  # and not the weight
    y.sum().backward()
    assert torch.equal(weight.grad, x)


@pytest.mark.parametrize("shape", [(2, 5, 6, 8), (2, 5, 24)])
def test_what_a_norm_reads_where_it_lies_is_moved(mover, monkeypatch, shape):
    monkeypatch.setattr(recompute, "LEAST_MOVED", 64)
    x = torch.randn(shape, requires_grad=True)
    mover.start()
    with mover.block(x), ops.use("triton", "rms_norm"):
        read = x * 2
        ops.rms_norm(read[:, :, :4] if x.ndim == 4 else read, torch.ones(shape[-1]), 1e-6)
    assert read.untyped_storage().data_ptr() in mover._sent[0]


def test_no_more_than_two_blocks_are_on_the_device_while_others_go_or_come(mover):
    total, _, running = passed(mover)
    total.backward()
    assert max(running) == 2 and len(running) == 10
    assert max(mover.held) == 2


def test_device_memory_is_let_go_behind_its_copies_by_an_abandoned_pass_too(mover):
    total, _, _ = passed(mover)
    parts = [part for shipment in mover._sent for part in shipment.values()]
    storages = [weakref.ref(part.device) for part in parts if part.device is not None]
    copies = {part.ready for part in parts}
    assert len(storages) == 2 and len(copies) == 5
    del total, parts
    mover.start()
    assert copies <= mover.main.waited and not any(storage() is not None for storage in storages)


def test_rows_of_another_length_use_the_same_pinned_memory(mover):
    for width in (MOST_IN_PIECE // 2, MOST_IN_PIECE // 4, 3 * MOST_IN_PIECE // 8):  # fp32: 2, 1 and 1.5 pieces
        passed(mover, width, 2)[0].backward()
    assert sum(mover.pinned) == 2 * 2 * MOST_IN_PIECE + 2 * MOST_IN_PIECE // 2


def test_a_backward_pass_that_comes_too_late_is_refused(mover):
    total, _, _ = passed(mover)
    passed(mover)
    with pytest.raises(KernelError, match=r"what block 4 moved .* another forward pass has begun"):
        total.backward()
