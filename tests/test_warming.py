"""The process that compiles the first step's kernels: what it leaves, and what a run does with and without it."""

import gc
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from cuda_driver import compiling_environment
from tiny_models import family, llama

from lumen import early, warming
from lumen.adapter import attach_lora
from lumen.checkpoint import load_model
from lumen.config import Data, Lora, Model, Output, RunConfig, Train
from lumen.data.batch import RowStream, stack
from lumen.data.packing import pack
from lumen.errors import KernelError
from lumen.nn.recompute import Keeping
from lumen.ops import ahead, quantize_nf4
from lumen.ops.ahead import Gpu
from lumen.text.conversation import Encoded
from lumen.warming import Warming

H100 = Gpu(
    major=9,
    minor=0,
    multi_processor_count=132,
    shared_memory_per_block_optin=232448,
    free_bytes=80 << 30,
    total_bytes=80 << 30,
)
NEEDED = {"_unpack_kernel", "_attention_grad_kv_kernel", "_rms_norm_forward_kernel", "_cross_entropy_kernel"}


def asking(folder, config: RunConfig) -> str:
    rows = [[Encoded(ids=list(range(length)), learn=[True] * length) for length in (20, 44)]]
    return warming._request(config, folder, "bfloat16", H100, stack(rows, 64), 64)


FORKED = """
import sys
from lumen import warming

sys.executable = "/bin/false"  # who forks needs no other
process = warming._start()
said = process.communicate(sys.stdin.read())[1]
sys.stderr.write(said)
sys.exit(process.returncode)
"""


@pytest.mark.slow
@pytest.mark.parametrize("process", [FORKED, warming.PROCESS], ids=["forked", "fresh"])
def test_the_first_step_of_a_run_is_compiled_and_marked(tmp_path, process):
    pytest.importorskip("triton")
    model = tmp_path / "model"
    llama(model).to(torch.bfloat16).save_pretrained(model)
    environment = compiling_environment(tmp_path)
    config = RunConfig(model=Model(path=str(model), nf4=True), lora=Lora(rank=4), data=Data(train=("x",)))
    asked, command = asking(model, config), [sys.executable, "-c", process]
    done = subprocess.run(command, input=asked, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done.stderr[-3000:]
    compiled = {path.stem for path in (tmp_path / "cache").rglob("*.cubin")}
    assert compiled >= NEEDED
    assert len(list((tmp_path / "cache").glob("lumen-*"))) == 1
    assert list((tmp_path / "cache").rglob("__triton_launcher*.so"))


def test_the_mark_is_of_what_decides_the_kernels(tmp_path, monkeypatch):
    """The same model trained into another folder, at another rate, finds them compiled; another rank does not."""
    monkeypatch.setattr(ahead, "know_triton", lambda: "3.6")
    monkeypatch.setattr(ahead, "cache_folder", lambda: tmp_path)
    config = RunConfig(model=Model(path="m"), data=Data(train=("x",)))
    mark = warming._mark(asking(tmp_path, config))
    again = replace(config, train=Train(lr=1e-5, steps=7), output=Output(folder="elsewhere"), data=Data(train=("y",)))
    assert warming._mark(asking(tmp_path, again)) == mark
    assert warming._mark(asking(tmp_path, replace(config, lora=Lora(rank=8)))) != mark
    assert warming._mark(asking(tmp_path, replace(config, train=Train(keep="input")))) != mark


WALK = """
import itertools, json, os, sys
from dataclasses import replace
import msgspec
from lumen import warming
from lumen.config import RunConfig
from lumen.nn.recompute import Keeping
from lumen.ops import ahead
from lumen.ops.ahead import Gpu

ahead._fork = lambda work: os.posix_spawn("/bin/true", ["true"], {})  # what would be compiled is counted
keep, shorten = warming.keep, warming._leave_repeated_blocks_out
ways = (Keeping("input"),) * 2 + (Keeping("attention"),) * 2 + (Keeping(),) * 9

def kernels(config, request, keeps, shortens):
    def keep_so(model, *rest):
        keep(model, *rest)
        model.keeping = ways[: len(model.blocks)] if keeps else model.keeping
        depths.append(len(model.blocks))
    depths = []
    warming.keep, warming._leave_repeated_blocks_out = keep_so, shortens
    with ahead.compiling(2) as finish:
        warming._take_step(config, request)
        return finish()[0]

for asked in json.loads(sys.stdin.read()):
    request = json.loads(asked)
    ahead.pretend(Gpu(**request["gpu"]))
    config = msgspec.convert(request["config"], RunConfig)
    for keeps in (False, True):
        print(*(kernels(config, request, keeps, shortens) for shortens in (shorten, lambda model: None)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["llama2 tied", "phi4-mini", "gemma2", "gemma3", "qwen2-moe", "qwen3-moe"])
def test_two_blocks_of_each_kind_launch_what_all_blocks_do(tmp_path, shape):
    pytest.importorskip("triton")
    family(tmp_path, shape, num_hidden_layers=7).to(torch.bfloat16).save_pretrained(tmp_path)
    settings = [{"lora": Lora(dropout=0.1)}, {"train": Train(method="full"), "model": Model(nf4=False)}]
    if "moe" not in shape:
        own = "o_proj"  # of the sixth layer alone
        settings.append({"lora": Lora(rank_pattern={rf"layers\.5\.self_attn\.{own}": 4})})
        settings.append({"lora": Lora(dora=True, modules_to_save=("embed",))})
    asked = [asking(tmp_path, RunConfig(data=Data(train=("x",)), **each)) for each in settings]
    done = subprocess.run(
        [sys.executable, "-c", WALK],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        env=compiling_environment(tmp_path),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    counts = [line.split() for line in done.stdout.splitlines()]
    assert len(counts) == 2 * len(asked)
    assert all(found == wanted and int(wanted) >= 10 for found, wanted in counts), counts


@pytest.mark.slow
def test_a_step_that_asks_for_values_is_compiled_as_far_as_it_is_known(tmp_path):
    pytest.importorskip("triton")
    model = tmp_path / "model"
    family(model, "qwen3-moe").to(torch.bfloat16).save_pretrained(model)
    config = RunConfig(lora=Lora(rank=4), data=Data(train=("x",)))  # too few columns for products of all experts
    command, environment = [sys.executable, "-c", warming.PROCESS], compiling_environment(tmp_path)
    done = subprocess.run(command, input=asking(model, config), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "for a part of the step" in done.stderr and "Traceback" not in done.stderr
    assert list((tmp_path / "cache").rglob("_rms_norm_forward_kernel.cubin"))
    assert len(list((tmp_path / "cache").glob("lumen-*"))) == 1


def test_blocks_that_hold_something_else_are_not_repeated(tmp_path):
    """Left are the one that keeps less, the first two, two of another rank, and one that is dense in a part."""
    llama(tmp_path, num_hidden_layers=9)
    model = load_model(tmp_path, nf4=True, device="cpu")
    attach_lora(model, Lora(rank=8, rank_pattern={r"layers\.[34]\.self_attn\.o_proj": 4}))
    down = model.blocks[6].mlp.down
    down.weight, down.nf4 = torch.nn.Parameter(down.base_weight(), requires_grad=False), None
    model.keeping = (Keeping("input"),) + (Keeping(),) * 8
    blocks = list(model.blocks)
    warming._leave_repeated_blocks_out(model)
    assert [blocks.index(block) for block in model.blocks] == [0, 1, 2, 3, 4, 6]
    assert model.keeping == (Keeping("input"),) + (Keeping(),) * 5


def test_a_packed_weight_in_shape_is_that_of_a_real_one():
    for shape in ((3, 64), (37, 41), (70, 300)):
        weight = torch.randn(shape, dtype=torch.bfloat16)
        found, wanted = warming._quantized_in_shape(weight), quantize_nf4(weight)
        assert (found.shape, found.dtype, found.nbytes) == (wanted.shape, wanted.dtype, wanted.nbytes)
        for name, tensor in wanted.tensors.items():
            assert (found.tensors[name].shape, found.tensors[name].dtype) == (tensor.shape, tensor.dtype), name


def test_on_a_cpu_nothing_is_started():
    idle = Warming(RunConfig(model=Model(path="nowhere", device="cpu"), data=Data(train=("x",))))
    idle.begin(None, None)
    idle.finish()


@pytest.fixture(params=["forked", "fresh"])
def started(request, monkeypatch, tmp_path):
    """`begin` with a request for a run on a GPU, where the process runs `code` instead."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(warming, "_fork_is_safe", lambda: request.param == "forked")
    monkeypatch.setattr(warming, "choose_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(Gpu, "of", lambda device: H100)
    monkeypatch.setattr(ahead, "compiles", lambda: True)
    monkeypatch.setattr(ahead, "know_triton", lambda: "3.6")
    monkeypatch.setattr(ahead, "start_driver", lambda: None)
    monkeypatch.setattr(warming, "_pack_once", lambda *_: None)
    monkeypatch.setattr(ahead, "cache_folder", lambda: tmp_path)

    def start(code: str) -> tuple[Warming, str]:
        monkeypatch.setattr(warming, "PROCESS", code)
        monkeypatch.setattr(warming, "serve", lambda _: exec(code, {}))
        config = RunConfig(model=Model(path="m"), data=Data(train=("x",)))
        begun, asked = Warming(config), asking(tmp_path, config)
        begun._ask(asked)
        return begun, asked

    return start


WHO = """
import json, logging, os, signal, sys
print(json.dumps({
    "session": os.getsid(0) == os.getpid(),
    "open": sorted(map(int, os.listdir("/proc/self/fd")))[:-1],  # but for the listing itself
    "handled": [n for n in signal.valid_signals() if callable(signal.getsignal(n)) and n != signal.SIGINT],
    "gpus": os.environ["CUDA_VISIBLE_DEVICES"],
}), file=sys.stderr)
logging.getLogger("lumen").warning("said")
sys.stderr.flush()
os._exit(1)
"""


def test_the_process_holds_nothing_of_the_run(started, tmp_path, caplog):
    """No file, no lock on one, no handler of a signal or of the log; interrupts go by, and there is no GPU."""
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    handler = logging.FileHandler(tmp_path / "log")
    logging.getLogger("lumen").addHandler(handler)
    try:
        with open(tmp_path / "held", "w") as held, caplog.at_level(logging.WARNING, "lumen"):
            os.set_inheritable(held.fileno(), False)
            started(WHO)[0].finish()
    finally:
        logging.getLogger("lumen").removeHandler(handler)
        handler.close()
        signal.signal(signal.SIGUSR1, before)
    (line,) = [line for line in caplog.text.splitlines() if line.startswith("{")]
    told = json.loads(line)
    assert told["session"] and told["open"] == [0, 1, 2] and not told["handled"] and told["gpus"] == ""
    assert "first used" in (tmp_path / "log").read_text() and "Logging error" not in caplog.text


def _counted(monkeypatch):
    """As where this process has counted its GPUs by CUDA: a child that hides them still finds them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def _beside_a_thread(monkeypatch):
    monkeypatch.setattr(warming.threading, "active_count", lambda: 2)


def _with_cuda_begun(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)


@pytest.mark.parametrize("unsafe", [None, _counted, _beside_a_thread, _with_cuda_begun])
def test_a_fork_is_taken_where_it_is_safe_and_an_interpreter_elsewhere(monkeypatch, unsafe):
    monkeypatch.setattr(warming.threading, "active_count", lambda: 1)  # whatever other tests have left
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if unsafe:
        unsafe(monkeypatch)

    def forked(requests):
        assert not gc.isenabled(), "what the run holds must not be ended here"
        sys.stderr.write("forked " + requests.read())

    monkeypatch.setattr(warming, "PROCESS", "import sys; sys.stderr.write('fresh ' + sys.stdin.read())")
    monkeypatch.setattr(warming, "serve", forked)
    process = warming._start()
    assert process.communicate("told")[1] == ("fresh told" if unsafe else "forked told")
    assert process.returncode == 0


def test_what_was_begun_early_is_waited_for_where_a_fork_is_thought_of(monkeypatch):
    """Else it were chance whether the fork is taken: that thread would be another one."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(early, "GPU", ("/dev/null",))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(early, "know_triton", lambda: time.sleep(0.05))
    running = threading.active_count
    others = running() - 1  # whatever other tests have left
    monkeypatch.setattr(warming.threading, "active_count", lambda: running() - others)
    early.begin()
    assert threading.active_count() == 2
    assert warming._fork_is_safe()


def test_the_process_is_told_what_the_run_will_do(started, tmp_path):
    begun, asked = started(f"import sys; open({str(tmp_path / 'told')!r}, 'w').write(sys.stdin.read())")
    begun.finish()
    told = json.loads((tmp_path / "told").read_text())
    assert told == json.loads(asked)
    assert told["batch"]["shapes"]["tokens"] == [[1, 64], "int64"] and told["batch"]["plain"] == {"packed": True}


def test_a_process_that_fails_is_said_and_no_obstacle(started, caplog):
    with caplog.at_level(logging.WARNING, "lumen"):
        started("raise RuntimeError('no compiler here')")[0].finish()
    assert "are when first used" in caplog.text and "no compiler here" in caplog.text


def test_a_process_that_does_not_end_is_given_up(started, caplog, monkeypatch):
    monkeypatch.setattr(warming, "LONGEST_S", 0.2)
    with caplog.at_level(logging.WARNING, "lumen"):
        started("import time; time.sleep(60)")[0].finish()
    assert "took more than 0.2 s" in caplog.text


def test_a_run_whose_kernels_are_marked_waits_for_nothing(started, tmp_path, monkeypatch):
    monkeypatch.setattr(warming, "_mark", lambda asked: tmp_path)
    begun, _ = started("import time; time.sleep(60)")
    assert begun._process is None


def test_a_cache_that_cannot_be_written_is_said_and_nothing_is_started(started, caplog, monkeypatch):
    monkeypatch.setattr(warming.os, "access", lambda folder, mode: mode != os.W_OK)
    with caplog.at_level(logging.WARNING, "lumen"):
        begun, _ = started("import time; time.sleep(60)")
    assert begun._process is None and "TRITON_CACHE_DIR" in caplog.text


def test_a_wait_that_one_notices_is_said(started, caplog, monkeypatch):
    monkeypatch.setattr(warming, "UNSAID_S", 0.1)
    with caplog.at_level(logging.WARNING, "lumen"):
        started("import time; time.sleep(0.5)")[0].finish()
    assert caplog.messages == [
        "Compiling kernels for this GPU: seconds, a minute on few cores. The next run finds them."
    ]


def test_of_a_failure_the_last_lines_are_said(started, caplog):
    with caplog.at_level(logging.WARNING, "lumen"):
        lines = "print(*range(9000), sep='\\n', file=sys.stderr)"
        started(f"import os, sys; {lines}; sys.stderr.flush(); os._exit(1)")[0].finish()
    assert caplog.text.rstrip().endswith("8999") and caplog.text.count("\n") <= warming.LINES + 2


def test_a_run_that_fails_or_is_interrupted_leaves_no_process(started, monkeypatch):
    begun, _ = started("import time; time.sleep(60)")
    process = begun._process
    del begun
    gc.collect()
    assert process.returncode == -signal.SIGKILL
    begun, _ = started("import time; time.sleep(60)")
    process = begun._process
    monkeypatch.setattr(Warming, "_wait", lambda self: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        begun.finish()
    assert process.returncode == -signal.SIGKILL


def test_without_a_c_compiler_the_error_says_what_to_do(monkeypatch):
    pytest.importorskip("triton")

    class Driver:
        @property
        def active(self):
            raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(ahead.triton.runtime, "driver", Driver())
    with pytest.raises(KernelError, match=r"Failed to find C compiler\. It wants a C compiler .* TRITON_CACHE_DIR"):
        ahead.start_driver()


def test_what_blocks_keep_follows_from_the_widest_batch(started, monkeypatch):
    """Rows that are not packed: the first batch is narrower than the longest row."""
    begun, _ = started("import time; time.sleep(60)")
    told = []
    monkeypatch.setattr(begun, "_ask", lambda asked: told.append(json.loads(asked)))
    rows = pack([Encoded([1] * n, [True] * n) for n in (4, 4, 4, 8)], 8, packing=False)
    first = RowStream(rows.rows, seed=2).take(2)
    assert max(len(example.ids) for row in first for example in row) == 4, "another seed would say nothing"
    source = SimpleNamespace(adapter=None, base="m")
    config = RunConfig(data=Data(train=("x",), packing=False), train=Train(batch_size=2, seed=2))
    begun.begin(config, SimpleNamespace(source=source, train=rows))
    begun.ready()
    (asked,) = told
    assert asked["batch"]["shapes"]["tokens"][0] == [2, 4] and asked["tokens"] == 2 * 8
