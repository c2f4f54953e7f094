"""The kernels of a run's first step, compiled by a process beside it while data is encoded and weights are loaded.

The process is a fork of the run, which saves it the import of PyTorch; where that could go wrong it is an interpreter
of its own. It is told the configuration, the GPU and the shapes of the first batch, builds the same model on the meta
device, and takes the first step there (`ops/ahead.py`): what would be launched is compiled into Triton's cache, as many
at once as there are cores. It touches neither the GPU nor the weights. When all is done it leaves a mark beside the
kernels, and the same run with the same Triton and the same lumen starts no second time.

Decision: fork where this is the only thread and CUDA was asked for nothing yet; see `_fork_is_safe`, `_serve_forked`.
Because: with another thread a lock may stay held in the child for good; and where CUDA has counted its GPUs, autograd
starts a thread for each, which fails in a child. A backward pass of the meta device itself runs in its caller's thread.
Revisit when: PyTorch counts GPUs anew in a child, or importing it takes no seconds any more.

A run that this does not foresee (a continued adapter, added tokens, products in 8 bits), a step that asks for values
(experts that are multiplied one by one), or a process that fails, means that kernels are compiled when they are first
launched, as ever. A failure is said by the logger `lumen`, and so is a wait that one notices.
"""

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TextIO

import msgspec
import torch
from torch import nn

from lumen import checkpoint, early
from lumen.adapter import attach_lora
from lumen.checkpoint import choose_device, choose_dtype, load_model
from lumen.config import RunConfig
from lumen.data.batch import Batch, RowStream, stack
from lumen.errors import KernelError
from lumen.models.decoder import Decoder
from lumen.objectives.examples import Examples
from lumen.objectives.sft import sft_loss
from lumen.ops import ahead
from lumen.ops.ahead import Gpu
from lumen.ops.nf4 import BLOCK, NESTED_BLOCK, NF4, quantize_nf4
from lumen.optim import AdamW, clip_factor, gradient_norm
from lumen.plan import keep
from lumen.trainable import make_optimizer

LOG = logging.getLogger("lumen")
PACKAGE = Path(__file__).resolve().parent
PROCESS = "import sys; from lumen.warming import serve; serve(sys.stdin)"
DECIDING = ("method", "keep", "offload", "memory_gib", "optimizer_bits")  # what of [train] decides which kernels run
DESCRIPTORS = "/proc/self/fd"  # of the files that a process holds
# the driver hides its GPUs, and it is the driver that PyTorch asks
WITHOUT_GPU = {"CUDA_VISIBLE_DEVICES": "", "PYTORCH_NVML_BASED_CUDA_CHECK": "0", "OMP_NUM_THREADS": "1"}
LONGEST_S = 60.0  # how long a run that is ready waits; everything takes 5 seconds on 16 cores, and a minute on one
UNSAID_S = 2.0  # how long it waits without a word
LINES = 20  # of what a process that failed has written: each kernel may have left as many


class Warming:
    """A run's side: `begin` as soon as the first batch is known, `finish` before the first step."""

    def __init__(self, config: RunConfig):
        """Starts the process where the run will be on a GPU for which kernels are compiled; else all this is idle."""
        self._process: subprocess.Popen | None = None
        self._wanted: tuple[Future, ...] = ()  # before a model may be loaded
        if config.model.device != "cpu" and ahead.compiles() and _is_foreseen(config) and torch.cuda.device_count():
            self._process = _start()  # before CUDA itself is asked: that count is of the driver's library beside it
            self._end = weakref.finalize(self, _kill, self._process)  # also where the run fails before `finish`
        self._device = choose_device(config.model.device)
        if self._process is None:
            return
        if self._device.type != "cuda":  # there is a GPU, but not for this PyTorch
            self._give_up()
            return
        threads = ThreadPoolExecutor(2)
        self._gpu: Future[Gpu] = threads.submit(Gpu.of, self._device)
        self._known: Future[None] = threads.submit(_know)
        nf4 = config.model.nf4
        self._packs: Future[None] = threads.submit(_pack_once, self._device, self._known) if nf4 else self._known
        self._wanted = (self._gpu, self._packs)
        threads.shutdown(wait=False)

    def ready(self) -> None:
        """Waits until a model may be loaded: the GPU was measured, and the kernel that packs weights is compiled.

        KernelError where Triton cannot launch at all.
        """
        for future in self._wanted:
            future.result()

    def begin(self, config: RunConfig, examples: Examples) -> None:
        """Says what is to be compiled: the first step on these rows. KernelError where Triton cannot launch at all."""
        if self._process is None:
            return
        if examples.source.adapter:  # a model that `_take_step` does not build
            self._give_up()
        else:
            packed, dtype = examples.train, choose_dtype(config.model.dtype, self._device)
            rows = RowStream(packed.rows, seed=config.train.seed).take(config.train.batch_size)
            batch = stack(rows, packed.longest if config.data.packing else 0)
            tokens = config.train.batch_size * packed.longest
            name = str(dtype).removeprefix("torch.")
            self._ask(_request(config, examples.source.base, name, self._gpu.result(), batch, tokens))
        self._packs.result()

    def _ask(self, asked: str) -> None:
        self._known.result()
        if _mark(asked).exists():
            self._give_up()
            return
        if not os.access(folder := ahead.cache_folder(), os.W_OK):
            LOG.warning("%s cannot be written: a kernel that it lacks fails. TRITON_CACHE_DIR names another.", folder)
            self._give_up()
            return
        with suppress(BrokenPipeError):  # it has ended before it was asked: `finish` says why
            self._process.stdin.write(asked)
            self._process.stdin.close()
        self._process.stdin = None  # closed, which `communicate` does not expect

    def finish(self) -> None:
        """Waits until all is compiled: the step would wait for the same kernels, one after the other."""
        if self._process is None:
            return
        began_s = time.monotonic()
        try:
            said = self._wait()
        except subprocess.TimeoutExpired:
            self._give_up()
            LOG.warning("Compiling kernels ahead took more than %g s and was given up.", LONGEST_S)
            return
        except BaseException:  # an interrupt
            self._give_up()
            raise
        said = "\n".join(said.strip().splitlines()[-LINES:])
        if self._process.returncode:
            LOG.warning("Kernels could not be compiled ahead, and are when first used:\n%s", said)
        elif said:
            LOG.info("%s", said)
        LOG.debug("waited %.1f s for kernels", time.monotonic() - began_s)
        self._end.detach()
        self._process = None

    def _wait(self) -> str:
        """What the process has written when it has ended; subprocess.TimeoutExpired after LONGEST_S."""
        try:
            return self._process.communicate(timeout=min(UNSAID_S, LONGEST_S))[1]
        except subprocess.TimeoutExpired:
            LOG.warning("Compiling kernels for this GPU: seconds, a minute on few cores. The next run finds them.")
        return self._process.communicate(timeout=max(LONGEST_S - UNSAID_S, 0))[1]

    def _give_up(self) -> None:
        self._end()
        self._process = None


def _start() -> subprocess.Popen:
    """The process, which waits for a request on its stdin; it writes to stderr what goes wrong, and nothing else."""
    paths = [str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-P", "-c", PROCESS],  # -P: no module of the folder where the user stands
        preexec_fn=_serve_forked if _fork_is_safe() else None,
        env=os.environ | WITHOUT_GPU | {"PYTHONPATH": os.pathsep.join(paths)},
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # an interrupt is the run's affair
    )


def _fork_is_safe() -> bool:
    """Whether a child of this process may do more than execute a program: no other thread of Python's can hold a lock.

    Waits for the thread that the command began, whose result is wanted before any kernel is compiled. The threads of
    libraries for linear algebra are no obstacle: those take care of forks, and the child uses none.
    """
    early.finish()
    return threading.active_count() == 1 and not torch.cuda.is_initialized() and os.path.isdir(DESCRIPTORS)


def _serve_forked() -> None:
    """In the child of a fork, in the place of a new interpreter: does what PROCESS does, and ends.

    Returns, so that PROCESS is executed after all, where this process had counted its GPUs by CUDA: it has no way to
    say so, but a child still counts them although they are hidden from it.
    """
    os.closerange(3, max(map(int, os.listdir(DESCRIPTORS))) + 1)  # the run's; its `Popen` waits for one of them
    os.environ.update(WITHOUT_GPU)
    if torch.cuda.is_available():
        return
    ahead.end_after(_serve_alone)


def _serve_alone() -> None:
    """`serve` without what the run has set up for itself; collecting garbage is off, and so nothing of it is ended."""
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    logging.disable()  # the run says the same itself, and its handlers may write to files that are closed here
    torch.set_num_threads(1)  # a team of threads does not survive a fork
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", 1)
    serve(sys.stdin)


def _kill(process: subprocess.Popen) -> None:
    """Ends the process and all that it has started."""
    if process.returncode is None:  # nobody has waited for it: the number is still its own
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def _know() -> None:
    """What this process will need too, half a second each."""
    ahead.know_triton()
    ahead.start_driver()


def _pack_once(device: torch.device, known: Future[None]) -> None:
    """Compiles the kernel that packs weights: loading needs it before the process could have made it."""
    known.result()
    with torch.cuda.device(device):
        quantize_nf4(torch.zeros(BLOCK, BLOCK, dtype=torch.bfloat16, device=device), check=False)


def _is_foreseen(config: RunConfig) -> bool:
    """Whether `_take_step` builds the model of this run: not where it hangs on more than the base and the settings."""
    return not (config.tokens.add or config.model.fp8)


def _request(config: RunConfig, base: Path, dtype: str, gpu: Gpu, batch: Batch, tokens: int) -> str:
    """What the process is told, as JSON.

    batch   the first one
    tokens  of the widest one, from which follows what blocks keep
    """
    plain = {name: value for name, value in vars(batch).items() if isinstance(value, bool | int)}
    shapes = {
        name: [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")] for name, tensor in batch.tensors.items()
    }
    asked = {"config": msgspec.to_builtins(config), "base": str(base), "dtype": dtype, "gpu": asdict(gpu)}
    return json.dumps(asked | {"batch": {"plain": plain, "shapes": shapes}, "tokens": tokens})


def _mark(asked: str) -> Path:
    """The file that says that all of a request is compiled; another lumen, Triton or PyTorch has another."""
    request = json.loads(asked)
    config = asdict(msgspec.convert(request["config"], RunConfig))
    chosen = {name: config["train"][name] for name in DECIDING}
    request["config"] = {"model": config["model"], "lora": config["lora"], "train": chosen}
    request["gpu"] |= {"free_bytes": request["gpu"]["free_bytes"] >> 32}  # other programs come and go
    code = hashlib.sha256(json.dumps(request, sort_keys=True).encode() + ahead.know_triton().encode())
    code.update(torch.__version__.encode())
    for path in sorted(PACKAGE.rglob("*.py")):
        code.update(path.read_bytes())
    return ahead.cache_folder() / f"lumen-{code.hexdigest()}"


# --- the process's side ----------------------------------------------------------------------------------------------


def serve(requests: TextIO) -> None:
    """Waits for one request and does it; without one (the run has ended) nothing. KernelError where a kernel failed."""
    with early.quick_turns(), ThreadPoolExecutor(1) as thread:  # which has ended before anything is forked
        known = thread.submit(ahead.know_triton)
        ahead.leave_compiler_out()
        torch.empty(1, dtype=torch.int64, device="meta") * torch.empty(1, device="meta")  # imports SymPy for 0.7 s
        known.result()
    asked = requests.read()
    if not asked:
        return
    mark, request = _mark(asked), json.loads(asked)
    ahead.pretend(Gpu(**request["gpu"]))
    # two for each core: the slowest kernel decides, and must not wait until another has ended
    with ahead.compiling(2 * len(os.sched_getaffinity(0))) as finish:
        try:
            _take_step(msgspec.convert(request["config"], RunConfig), request)
        except NotImplementedError as error:  # a meta tensor has no values: what is launched further on is not known
            sys.stderr.write(f"Kernels were compiled ahead for a part of the step: {error}\n")
        compiled, failed = finish()
    if failed:
        raise KernelError(f"{failed} of {failed + compiled} kernels could not be compiled.")
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()


def _take_step(config: RunConfig, request: dict) -> None:
    """The first step of the run on the meta device, as `train.prepare` and `Trainer.train` make and take it."""
    dtype, full = getattr(torch, request["dtype"]), config.train.method == "full"
    checkpoint.quantize_nf4 = _quantized_in_shape
    stored = "float32" if full else request["dtype"]
    model = load_model(request["base"], dtype=stored, nf4=config.model.nf4, device="meta")
    model.dtype = dtype
    if full:
        model.requires_grad_(True)
    else:
        attach_lora(model, config.lora)
    Decoder.device = torch.device("cuda")  # what follows is decided as it would be there
    config = replace(config, train=replace(config.train, optimizer_paged=False))  # the same kernels, no pinned memory
    optimizer = make_optimizer(model.train(), config)
    _update(optimizer, config)  # first, for its kernel is one of those that take longest to compile
    tensors = {
        name: torch.empty(shape, dtype=getattr(torch, kind), device="meta")
        for name, (shape, kind) in request["batch"]["shapes"].items()
    }
    batch = Batch(**tensors, **request["batch"]["plain"])
    learned = sum(parameter.numel() for parameter in optimizer.parameters.values())
    _fill_memory(model, optimizer.state_bytes, request["gpu"])
    keep(model, config, request["tokens"], learned)
    model.keeping = tuple(replace(keeping, moved=False) for keeping in model.keeping)  # the same kernels
    _leave_repeated_blocks_out(model)
    sft_loss(model, batch).total.backward()


def _update(optimizer: AdamW, config: RunConfig) -> None:
    for parameter in optimizer.parameters.values():  # their number is something that Triton looks at
        parameter.grad = torch.empty_like(parameter)
    norm = gradient_norm(optimizer.parameters.values())
    optimizer.step(config.train.lr, clip_factor(norm, config.train.clip))
    optimizer.zero_grad()


def _leave_repeated_blocks_out(model: Decoder) -> None:
    """Leaves two blocks of each kind, keeping the same: behind the first nothing is launched that is not by those.

    The first block of all is one of a kind, where its input needs no gradient. Blocks of one kind hold the same: a
    pattern may give their pairs other ranks, and a checkpoint in NF4 may leave some of their weights dense.
    """
    seen: Counter[tuple] = Counter()
    left = []
    for block, layer, keeping in zip(model.blocks, model.spec.layers, model.keeping, strict=True):
        held = tuple((name, tensor.shape, tensor.dtype) for name, tensor in block.named_parameters())
        seen[layer, keeping, held] += 1
        if seen[layer, keeping, held] <= 2:
            left.append((block, keeping))
    blocks, model.keeping = zip(*left, strict=True)
    model.blocks = nn.ModuleList(blocks)


def _quantized_in_shape(weight: torch.Tensor, *, check: bool = True) -> NF4:
    """What `quantize_nf4` makes of a weight, without memory; `_pack_once` has compiled its kernel."""
    blocks = -(-weight.numel() // BLOCK)
    empty = {"device": weight.device}
    return NF4(
        codes=torch.empty(-(-weight.numel() // 2), dtype=torch.uint8, **empty),
        absmax=torch.empty(blocks, dtype=torch.uint8, **empty),
        nested_absmax=torch.empty(-(-blocks // NESTED_BLOCK), **empty),
        offset=torch.empty((), **empty),
        shape=tuple(weight.shape),
        dtype=weight.dtype,
    )


def _fill_memory(model: Decoder, state_bytes: int, gpu: dict) -> None:
    """From here on the GPU that is pretended holds the model and the optimizer's state."""
    packed = [module.nf4 for module in model.modules() if getattr(module, "nf4", None) is not None]
    used = sum(tensor.nbytes for tensor in [*model.parameters(), *packed]) + state_bytes
    torch.cuda.mem_get_info = lambda device=None: (gpu["free_bytes"] - used, gpu["total_bytes"])
    torch.cuda.memory_allocated = torch.cuda.memory_reserved = lambda device=None: used
