"""What each block keeps for its backward pass, and where: on the device, or in the host's memory meanwhile.

For each token a block can keep

    all        x, q k v, the attention's output, x in the middle, gate, up: everything that a matrix product made
    attention  the same without gate and up: the MLP runs forward once more, up to them
    input      x alone: the block runs forward once more, up to gate and up

and make the rest again in its backward pass; norms, activations and what the operations make from these are never kept
(`ops/lora.py`). Of many rows, an MLP that is made again takes a lot at a time, forward and backward, so that gate and
up are never there for all of them.

What is kept may be *moved*: copied to pinned host memory on a stream of its own while the next block computes, and
brought back while the one behind it computes its gradient.

All three are exact, and give the same bits where the operations do. In lots, gradients of an MLP's weights and pairs
are sums over lots, rounded as such. And where dropout acts, each lot draws seeds of its own, where an MLP taken whole
draws them once: the masks of that MLP are others, and of all that draws after it. A lot has the same masks forward and
backward, so that its gradients are those of the loss that was computed. But how many blocks keep all follows the memory
that is free: over MOST_ROWS tokens at a time and with dropout, the same seed repeats a run, and a run that is resumed
goes on as it would have, only where the same blocks keep all. A `train.keep` other than "auto" makes it so.

A `Keeping` says it for one block, `choose_keeping` for all, from the memory that there is.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from lumen.errors import KernelError
from lumen.ops import uncompiled
from lumen.ops.dropout import seeds_noted, seeds_repeated
from lumen.spec import ModelSpec

Level = Literal["all", "attention", "input"]

ON_THE_WAY = 2  # moved blocks that are on the device at a time: one at work, and one that comes or goes beside it
MOST_ROWS = 2**15  # of one lot: 1.9 GB of gate and up for Llama 3.1 8B, whose unpacking takes 1 % of the lot's time

_recomputing: ContextVar[bool] = ContextVar("recomputing", default=False)


def recomputing() -> bool:
    """Whether a part of a block runs again only for what its backward pass needs: its output is not read."""
    return _recomputing.get()


@contextmanager
def _again(seeds: list[Tensor]) -> Iterator[None]:
    token = _recomputing.set(True)
    try:
        with seeds_repeated(seeds):
            yield
    finally:
        _recomputing.reset(token)


class _EachTime:
    """`_again`, entered anew by every backward pass: through a graph that is retained there are several."""

    def __init__(self, seeds: list[Tensor]):
        self.seeds = seeds

    def __enter__(self) -> None:
        self.within = _again(self.seeds)
        self.within.__enter__()

    def __exit__(self, *raised) -> None:
        self.within.__exit__(*raised)


@uncompiled  # torch.compile knows no checkpoint whose recomputation has a context of its own
def recomputed(part: Callable[..., Tensor], *arguments, random: bool = False) -> Tensor:
    """`part(*arguments)`, of which only the arguments are kept for the backward pass.

    A part may have parts that are recomputed themselves. While the whole runs again, they do not: the backward pass
    wants no more of them than their arguments, and runs each by itself afterwards. The result of such a part has the
    shape and the dtype of its first argument.

    random  the part draws random numbers besides the seeds of dropout: it must draw the same again
    """
    if recomputing():
        part = _first
    seeds: list[Tensor] = []  # of dropout, which draws them apart from other random numbers
    return checkpoint(
        part, *arguments, use_reentrant=False, context_fn=lambda: (seeds_noted(seeds), _EachTime(seeds)),
        determinism_check="none", preserve_rng_state=random,
    )  # fmt: skip


def _first(x: Tensor, *_: object) -> Tensor:
    return x


def lots(x: Tensor) -> int:
    """In how many lots the rows of x (…, D) are computed again."""
    return max(-(-x.shape[:-1].numel() // MOST_ROWS), 1)


def recomputed_rows(part: Callable[..., Tensor], x: Tensor, *others, random: bool = False) -> Tensor:
    """`recomputed` of a part that makes a row (D,) of its result from the same row of x (…, D), MOST_ROWS at a time."""
    if lots(x) == 1:
        return recomputed(part, x, *others, random=random)
    rows = x.reshape(-1, x.shape[-1])
    # not tensor_split: its gradient is a sum of as many tensors as there are lots, each as large as x
    parts = [recomputed(part, lot, *others, random=random) for lot in rows.split(-(-len(rows) // lots(x)))]
    return torch.cat(parts).view(x.shape)


@dataclass(frozen=True)
class Keeping:
    """What one block keeps, and whether it waits in the host's memory."""

    level: Level = "all"
    moved: bool = False


KEEP_ALL, KEEP_INPUT = Keeping(), Keeping("input")


def bytes_per_token(spec: ModelSpec, level: Level, itemsize: int = 2) -> int:
    """What a block keeps for each token."""
    attention = 2 * spec.dim + (2 * spec.heads + 2 * spec.kv_heads) * spec.head_dim
    heads = (spec.heads + spec.kv_heads) * spec.head_dim
    # q and k from per-head norms, beside the storage of all three that v is a part of
    extra = 2 * spec.dim * (spec.norm_at == "around") + heads * (spec.qk_norm == "head")
    values = {"input": spec.dim, "attention": attention + extra, "all": attention + extra + 2 * spec.mlp_dim}[level]
    return values * itemsize


# Moving ---------------------------------------------------------------------------------------------------------------

LEAST_MOVED = 1 << 20  # bytes: what is smaller stays
MOST_IN_PIECE = 1 << 26  # bytes


def piece_sizes(size: int) -> list[int]:
    """Bytes of the pieces of pinned memory that hold `size` bytes, falling; less than LEAST_MOVED too many.

    All are powers of two: PyTorch rounds what it pins up to one, so that 2.9 GB in one piece would take 4.3. And there
    are few sizes, so that a batch of another shape finds pieces that are there.
    """
    whole, rest = divmod(size, MOST_IN_PIECE)
    rest = -(-rest // LEAST_MOVED)
    bits = reversed(range((MOST_IN_PIECE // LEAST_MOVED).bit_length()))
    return [MOST_IN_PIECE] * whole + [LEAST_MOVED << bit for bit in bits if rest >> bit & 1]


@dataclass
class _Moved:
    """One storage on its way to the host, there, or back."""

    host: list[Tensor]  # uint8, pinned, of `piece_sizes`
    device: Tensor | None  # uint8, held until its copy is done; the copy that came back, later
    ready: torch.cuda.Event  # the newest copy is done
    size_bytes: int

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each piece of the host's memory, as far as it is filled, and the stretch on the device that it holds."""
        begin = 0
        for piece in self.host:
            stretch = self.device[begin : begin + len(piece)]
            yield piece[: len(stretch)], stretch
            begin += len(piece)


_Shipment = dict[int, _Moved]  # all that one block has moved, by address of the storage


class Mover:
    """Keeps what blocks save in pinned host memory, a block behind and a block ahead of the computation.

    One object serves one model; its host memory is taken once and used again in every step. At most two blocks' worth
    is on the device: in a forward pass that of the block that runs and of the one before, in a backward pass that of
    the block that runs and of the one that is next. What the first block moved stays there until `start`.

    A tensor without a history stays on the device: weights, and what all blocks share, as tables of angles. A block's
    input is moved also where it has none, as that of the first block under an embedding that does not learn.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.out, self.back = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._free: dict[int, list[Tensor]] = {}
        self._sent: list[_Shipment] = []

    def start(self) -> None:
        """A forward pass begins: what the one before has moved is forgotten."""
        for shipment in self._sent:
            self._let_go(shipment)
            for part in shipment.values():
                for piece in part.host:
                    self._free.setdefault(len(piece), []).append(piece)
            shipment.clear()  # a graph that is still there may hold it
        self._sent = []

    def block(self, x: Tensor) -> AbstractContextManager:
        """Inside the `with`, a block runs forward on x, and what it saves is moved.

        Its backward pass must come before the next `start`, and raises KernelError otherwise.
        """
        shipment: _Shipment = {}
        self._sent.append(shipment)
        number = len(self._sent) - 1
        if number >= 2:
            self._let_go(self._sent[number - 2])
        entering = x.untyped_storage().data_ptr()

        def pack(tensor: Tensor):
            storage = tensor.untyped_storage()
            address = storage.data_ptr()
            stays = tensor.is_leaf and address != entering
            if tensor.device != self.device or stays or storage.nbytes() < LEAST_MOVED:
                return tensor
            if address not in shipment:
                shipment[address] = self._send(storage)
            return address, tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()

        def unpack(packed) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            address, dtype, shape, stride, offset = packed
            if address not in shipment:
                raise KernelError(
                    f"A backward pass wants what block {number} moved to the host's memory, but another forward pass "
                    f"has begun since and has taken that memory. Run each backward pass before the next forward pass, "
                    f"or set train.offload = false."
                )
            self._fetch(number)
            part = shipment[address]
            self._main().wait_event(part.ready)
            return part.device.view(dtype).as_strided(shape, stride, offset)

        return saved_tensors_hooks(pack, unpack)

    def _main(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.device)

    def _send(self, storage: torch.UntypedStorage) -> _Moved:
        size = storage.nbytes()
        host = [self._piece(one) for one in piece_sizes(size)]
        device = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, 0, (size,))
        part = _Moved(host=host, device=device, ready=torch.cuda.Event(), size_bytes=size)
        self.out.wait_stream(self._main())
        with torch.cuda.stream(self.out):
            for piece, stretch in part.pairs():
                piece.copy_(stretch, non_blocking=True)
        part.ready.record(self.out)
        return part

    def _piece(self, size: int) -> Tensor:
        pool = self._free.get(size)
        return pool.pop() if pool else torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def _let_go(self, shipment: _Shipment) -> None:
        """Gives device memory back; the main stream waits for the copies, so that nobody writes there before."""
        for part in shipment.values():
            if part.device is not None:
                self._main().wait_event(part.ready)
                part.device = None

    def _fetch(self, number: int) -> None:
        """Sees that block `number` is home and the one before it on its way; all others give their memory back first,
        which is where these two come to lie.
        """
        for index, shipment in enumerate(self._sent):
            if index not in (number, number - 1):
                self._let_go(shipment)
        for wanted in (number, number - 1):
            if wanted >= 0:
                self._bring_home(self._sent[wanted])

    def _bring_home(self, shipment: _Shipment) -> None:
        for part in shipment.values():
            if part.device is not None:  # it is here already, or was never let go
                continue
            part.device = torch.empty(part.size_bytes, dtype=torch.uint8, device=self.device)
            self.back.wait_stream(self._main())  # whoever had this memory before is done with it
            with torch.cuda.stream(self.back):
                for piece, stretch in part.pairs():
                    stretch.copy_(piece, non_blocking=True)
            part.ready = self.back.record_event()


# Choosing -------------------------------------------------------------------------------------------------------------


def choose_keeping(
    cost: Mapping[Level, int], depth: int, room_bytes: int, *, host_bytes: int, once_bytes: int = 0
) -> tuple[Keeping, ...]:
    """One `Keeping` for each of `depth` blocks, the fastest that fits into `room_bytes` of device memory.

    cost        bytes that a block of each level keeps, on the device or in the host's memory
    host_bytes  of the host's memory, for what is moved; 0 where nothing may be
    once_bytes  what is wanted besides, once, where a block keeps all

    The last blocks keep all: theirs is needed first and freed first. The others, measured on an H200, fastest first:
    a few compute their MLP again; all of them do, and what attention made waits in the host's memory, over a bus that
    is idle otherwise; they keep their input alone, there or here, which is chosen also where not even that fits.
    """

    def mixed(least: Keeping, each: int, fixed: int = 0) -> tuple[Keeping, ...]:
        """As many blocks as fit keep all, the rest `least`, at `each` bytes a block and `fixed` for them together."""
        whole = int((room_bytes - fixed - once_bytes - depth * each) // (cost["all"] - each))
        whole = min(max(whole, 0), depth)
        return (least,) * (depth - whole) + (KEEP_ALL,) * whole

    if depth * cost["all"] + once_bytes <= room_bytes:
        return (KEEP_ALL,) * depth
    on_device = mixed(Keeping("attention"), cost["attention"])
    if on_device.count(KEEP_ALL) >= depth // 2:
        return on_device
    for level in ("attention", "input"):
        going = ON_THE_WAY * cost[level]
        moved = mixed(Keeping(level, moved=True), 0, going)
        on_host = cost[level] * sum(each.moved for each in moved)
        if on_host <= host_bytes and (level == "input" or going <= room_bytes):
            return moved
    return mixed(KEEP_INPUT, cost["input"])
