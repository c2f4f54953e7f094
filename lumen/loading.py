"""A run's model, loaded by a thread of its own while the data is encoded: one waits for a disk, the other computes.

That is so on a GPU. On the CPU both want the same cores, and the model is loaded when it is asked for.

What a person sees is the same in both cases. An error in the data ends the loading between two pieces of a tensor and
is what is reported; one in the model is raised, and what loading logs is said, where the model is asked for.
"""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

import torch

from lumen.checkpoint import choose_device, choose_dtype, load_model
from lumen.config import RunConfig
from lumen.early import quick_turns
from lumen.models.decoder import Decoder
from lumen.source import starting_point

LOG = logging.getLogger("lumen")


class _Stopped(Exception):
    """Nobody wants the model any more."""


class Loading:
    """The base model of a run on its way. A context manager; leaving it early ends the loading, and waits for that."""

    def __init__(self, config: RunConfig, ready: Callable[[], None]) -> None:
        """Knows the model's folder, or raises the errors of `starting_point`.

        ready  waits until a model may be loaded onto a GPU
        """
        self._config, self._ready, self._base = config, ready, starting_point(config).base
        self._beside = ExitStack()  # what is undone when loading beside the caller ends
        self._model: Future[Decoder] | None = None  # where it is loaded beside the caller
        self._stopped = False
        self._thread = 0  # its identity, where there is one beside the caller's
        self._records: list[logging.LogRecord] = []

    def __enter__(self) -> "Loading":
        if choose_device(self._config.model.device).type == "cuda":
            # GPU and stream are those of a thread: the caller may have chosen others than the first
            stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None
            LOG.addFilter(self._hold_back)
            self._beside.callback(LOG.removeFilter, self._hold_back)
            self._beside.enter_context(quick_turns())  # loading makes thousands of short calls
            threads = self._beside.enter_context(ThreadPoolExecutor(1, thread_name_prefix="lumen-loading"))
            self._model = threads.submit(self._load_beside, stream)
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped = True
        try:
            self._beside.close()  # all of it, also where an interrupt ends the wait for the thread
        finally:
            self._model = None  # an error in it holds the thread's frames, and those the weights and this object

    def model(self) -> Decoder:
        """The model, frozen and in eval mode, as soon as it is there; errors are those of `load_model`.

        Weights are in the compute dtype, or in fp32 where they learn: the layers round them where they use them.
        """
        if self._model is None:
            return self._load()
        try:
            return self._model.result()
        finally:
            while self._records:
                LOG.handle(self._records.pop(0))

    def _load_beside(self, stream: "torch.cuda.Stream | None") -> Decoder:
        self._thread = threading.get_ident()
        with torch.cuda.stream(stream):
            return self._load()

    def _load(self) -> Decoder:
        asked, full = self._config.model, self._config.train.method == "full"
        stored = {"dtype": "float32" if full else asked.dtype, "device": asked.device, "nf4": asked.nf4}
        model = load_model(self._base, **stored, fp8=asked.fp8, proceed=self._proceed)
        model.dtype = choose_dtype(asked.dtype, model.device)
        return model

    def _proceed(self) -> None:
        if self._thread:
            self._ready()
        if self._stopped:
            raise _Stopped

    def _hold_back(self, record: logging.LogRecord) -> bool:
        """A filter: keeps what the thread says for later, and lets pass what others say."""
        own = threading.get_ident() == self._thread
        if own:
            self._records.append(record)
        return not own
