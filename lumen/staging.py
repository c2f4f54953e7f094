"""Weights on their way from a file to a GPU: some are read while others are copied and the first are already used.

    pages of the file → pinned memory (threads) → the GPU's memory (a stream of its own) → their place in the model

A GPU cannot fetch from memory that is mapped from a file. PyTorch would copy each weight in one thread into pinned
memory that CUDA keeps, and nothing else would happen meanwhile. Here threads fill pinned pieces, the GPU fetches those
that are full, and the caller quantizes what has arrived.

Beside the model this takes PIECES pieces of pinned memory, and on the GPU AHEAD_BYTES of weights that are not yet used.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from queue import SimpleQueue

import numpy
import torch
from torch import Tensor

from lumen.ops.nf4 import NF4

READERS = 4  # threads; one alone copies 5 to 9 GB/s from pages that are in memory
PIECES = 8  # two for each reader: one is filled while the other is fetched
PIECE_BYTES = 16 * 2**20
AHEAD_BYTES = 256 * 2**20


def go_on() -> None:
    """The `proceed` of who has no reason to end what is under way."""


def carry(
    weights: Iterable[Tensor | NF4], device: torch.device, proceed: Callable[[], None] = go_on
) -> Iterator[Tensor | NF4]:
    """The same weights on `device`, in their order; `weights` is asked for the next ones while the first are in use.

    weights  on the CPU, as views of a file's pages; on the CPU they stay these views
    proceed  called for each piece that arrives; what it raises ends all
    """
    return staged(weights, device, proceed) if device.type == "cuda" else (weight.to(device) for weight in weights)


def staged(
    weights: Iterable[Tensor | NF4], device: torch.device, proceed: Callable[[], None] = go_on
) -> Iterator[Tensor | NF4]:
    """`carry` through pinned memory, for a device with streams; on the CPU the same steps make copies."""
    ahead: deque[tuple[int, Callable[[], Tensor | NF4]]] = deque()
    with _Carrier(device, proceed) as carrier:
        for weight in weights:
            ahead.append((weight.nbytes, carrier.send(weight)))
            while sum(size_bytes for size_bytes, _ in ahead) > AHEAD_BYTES:
                yield ahead.popleft()[1]()
        while ahead:
            yield ahead.popleft()[1]()


@dataclass(eq=False)
class _Piece:
    memory: Tensor  # uint8 (PIECE_BYTES,), pinned
    fetched: torch.Event  # when the device has what was put here last


class _Carrier:
    """The threads, the stream and the pinned memory. A context manager; leaving it waits for what is under way."""

    def __init__(self, device: torch.device, proceed: Callable[[], None]) -> None:
        self._device, self._proceed = device, proceed
        self._runtime = torch.get_device_module(device)
        self._stream = self._runtime.Stream(device)
        self._free: SimpleQueue[_Piece] = SimpleQueue()
        for _ in range(PIECES):
            memory = torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=device.type != "cpu")
            self._free.put(_Piece(memory, self._runtime.Event()))
        self._readers = ThreadPoolExecutor(READERS)

    def __enter__(self) -> "_Carrier":
        return self

    def __exit__(self, *_: object) -> None:
        self._readers.shutdown(cancel_futures=True)
        self._runtime.synchronize(self._device)  # what was sent and not used is about to be freed

    def send(self, weight: Tensor | NF4) -> Callable[[], Tensor | NF4]:
        """Puts the weight on its way; the result, called, gives it on the device, for use on the current stream."""
        if isinstance(weight, NF4):
            sent = {name: self._send(tensor) for name, tensor in weight.tensors.items()}
            return lambda: replace(weight, **{name: arrive() for name, arrive in sent.items()})
        return self._send(weight)

    def _send(self, tensor: Tensor) -> Callable[[], Tensor]:
        target = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
        allocated = self._runtime.Event()  # kernels that were queued before may still use this memory
        allocated.record(self._runtime.current_stream(self._device))
        source, bytes_of_target = (t.detach().reshape(-1).view(torch.uint8) for t in (tensor, target))
        pieces = zip(source.split(PIECE_BYTES), bytes_of_target.split(PIECE_BYTES), strict=True)
        sent = [self._readers.submit(self._carry, *piece, allocated) for piece in pieces]

        def arrive() -> Tensor:
            for piece in sent:
                self._proceed()
                self._runtime.current_stream(self._device).wait_event(piece.result())
            return target

        return arrive

    def _carry(self, source: Tensor, target: Tensor, allocated: torch.Event) -> torch.Event:
        """One piece, in a reader's thread; returns the event of its arrival."""
        piece = self._free.get()
        try:
            piece.fetched.synchronize()
            memory = piece.memory[: len(source)]
            # NumPy copies in this thread alone; PyTorch would start a team of threads for each reader
            numpy.copyto(memory.numpy(), source.numpy())
            # the mode belongs to a thread: the target may be of the caller's inference mode
            with torch.inference_mode(), self._runtime.stream(self._stream):
                self._stream.wait_event(allocated)
                target.copy_(memory, non_blocking=True)
                piece.fetched = self._runtime.Event()
                piece.fetched.record(self._stream)
            return piece.fetched
        finally:
            self._free.put(piece)
