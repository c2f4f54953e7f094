"""A GPU whose memory does not suffice, played on a CPU by a loss that raises PyTorch's own error."""

import pytest
import torch
from tiny_models import llama

from lumen import memory
from lumen.capture import Passes
from lumen.checkpoint import load_model
from lumen.data.batch import stack
from lumen.data.packing import pack
from lumen.errors import LumenError
from lumen.memory import GIB, OF_WEIGHTS, host_memory_bytes, memory_told
from lumen.objectives import sft
from lumen.optim import AdamW
from lumen.text.conversation import Encoded

SAID = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB of which …"
PACKED = pack([Encoded([2] * 9, [True] * 9, "a:1"), Encoded([3] * 7, [True] * 7, "a:2")], 9)


def exceeding(*_, **__):
    raise torch.OutOfMemoryError(SAID)


def holding(monkeypatch, tensors: float, reserved: float):
    """As if PyTorch held and had reserved so many GiB of a GPU."""
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: int(tensors * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: int(reserved * GIB))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (GIB // 2, 80 * GIB))


def run_out(tmp_path) -> str:
    llama(tmp_path)
    passes = Passes(load_model(tmp_path), exceeding, capture=False)
    with pytest.raises(LumenError) as caught:
        passes.run(stack(PACKED.rows))
    assert isinstance(caught.value, torch.OutOfMemoryError)  # for who tries whether something fits
    assert str(caught.value.__cause__) == SAID
    return str(caught.value)


def test_a_pass_that_does_not_fit_says_which_what_is_held_and_what_takes_less(tmp_path, monkeypatch):
    holding(monkeypatch, tensors=70, reserved=78.25)
    message = run_out(tmp_path)
    assert "a pass over 2 rows x 9 tokens: 2.50 GiB more were wanted" in message
    assert "hold 70.00 GiB, and 8.25 GiB lie reserved and unused" in message
    assert "of the device's 80.00 GiB 0.50 are free" in message
    for key in ("batch_size", "accumulate", 'keep="input"', "memory_gib"):
        assert f"train.{key}" in message
    assert "data.max_length" in message and "python -m lumen.plan RUN" in message
    assert message.endswith("PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True may do by itself.")


@pytest.mark.parametrize(("reserved", "set_to"), [(71, ""), (78.25, "expandable_segments:True")])
def test_pieces_that_grow_are_advised_only_where_much_is_unused_and_they_do_not(
    tmp_path, monkeypatch, reserved, set_to
):
    holding(monkeypatch, tensors=70, reserved=reserved)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", set_to)
    assert "expandable_segments" not in run_out(tmp_path)


def test_an_evaluation_that_does_not_fit_says_so(tmp_path, monkeypatch):
    llama(tmp_path)
    monkeypatch.setattr(sft, "linear_cross_entropy", exceeding)
    with pytest.raises(LumenError, match="an evaluation of 1 row x 9 tokens"):
        sft.mean_loss(load_model(tmp_path), PACKED, 1)


def test_an_update_that_does_not_fit_says_so(monkeypatch):
    layer = torch.nn.Linear(3, 3)
    layer.weight.grad = torch.ones(3, 3)
    optimizer = AdamW(layer.named_parameters(), beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0)
    monkeypatch.setattr("lumen.optim.adamw", exceeding)
    with pytest.raises(LumenError, match=r"an update by AdamW.*train\.optimizer_paged"):
        optimizer.step(1e-3)


def test_who_stands_nearest_tells_it_and_other_errors_pass():
    with (
        pytest.raises(LumenError, match=r"for inside: "),
        memory_told("outside", ""),
        memory_told("inside", OF_WEIGHTS),
    ):
        exceeding()
    with pytest.raises(RuntimeError, match=r"^another$"), memory_told("inside", OF_WEIGHTS):
        raise RuntimeError("another")


def test_the_hosts_memory_is_what_the_system_and_the_container_still_have_to_give(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "GROUPS", tmp_path)
    monkeypatch.setattr(memory, "OWN_GROUPS", tmp_path / "own")
    assert host_memory_bytes() > 2**60  # nobody says
    (tmp_path / "meminfo").write_text("MemTotal:       131981020 kB\nMemAvailable:   9 kB\n")
    assert host_memory_bytes() == 9 * 1024
    for file, text in (("memory.max", "max"), ("memory.current", "9000"), ("memory.stat", "anon 5\nactive_file 7\n")):
        (tmp_path / file).write_text(text + "\n")
    assert host_memory_bytes() == 9 * 1024
    (tmp_path / "memory.max").write_text("9500\n")
    assert host_memory_bytes() == 9500 - 9000 + 7  # files that were read need not stay
    (tmp_path / "meminfo").write_text("MemAvailable:       0 kB\n")
    assert host_memory_bytes() == 0
    (tmp_path / "meminfo").unlink()
    (tmp_path / "memory.max").unlink()
    (tmp_path / "memory.max").mkdir()  # as good as a file that may not be read
    assert host_memory_bytes() > 2**60


def test_the_limit_of_a_container_of_the_first_version_is_read_too(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "GROUPS", tmp_path)
    monkeypatch.setattr(memory, "OWN_GROUPS", tmp_path / "own")
    (tmp_path / "meminfo").write_text("MemAvailable:   9 kB\n")
    (tmp_path / "memory").mkdir()
    words = "inactive_file 1\nactive_file 2\ntotal_inactive_file 300\ntotal_active_file 40\n"
    for file, text in (("limit_in_bytes", "9223372036854771712\n"), ("usage_in_bytes", "4000\n"), ("stat", words)):
        (tmp_path / "memory" / f"memory.{file}").write_text(text)
    assert host_memory_bytes() == 9 * 1024  # this is how it says that there is no limit
    (tmp_path / "memory/memory.limit_in_bytes").write_text("5000\n")
    assert host_memory_bytes() == 5000 - 4000 + 340


@pytest.mark.parametrize(
    ("place", "lines", "files", "words"),
    [
        ("", "0::/a.slice/b c.scope\n", ("memory.max", "memory.current"), "active_file 7\n"),
        ("memory", "4:cpu:/x\n3:hugetlb,memory:/a.slice/b c.scope\n1:name=systemd:/y\n0::/\n",
         ("memory.limit_in_bytes", "memory.usage_in_bytes"), "active_file 1\ntotal_active_file 7\n"),
    ],
)  # fmt: skip
def test_the_least_of_all_groups_around_the_process_counts(place, lines, files, words, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "GROUPS", tmp_path)
    monkeypatch.setattr(memory, "OWN_GROUPS", tmp_path / "own")
    (tmp_path / "own").write_text(lines)
    root = tmp_path / place
    inner = root / "a.slice" / "b c.scope"
    inner.mkdir(parents=True)

    def limit(group, most, held):
        for file, text in (*zip(files, (most, held), strict=True), ("memory.stat", words)):
            (group / file).write_text(f"{text}\n")

    limit(root, 9000, 100)
    assert host_memory_bytes() == 9000 - 100 + 7
    limit(root / "a.slice", 500, 60)
    assert host_memory_bytes() == 500 - 60 + 7
    limit(inner, "max" if not place else 2**63 - 4096, 50)
    assert host_memory_bytes() == 500 - 60 + 7
    limit(inner, 80, 50)
    assert host_memory_bytes() == 80 - 50 + 7
    for outside in ("/../../a.slice/b c.scope", "/elsewhere"):  # as a container's own root may be told
        (tmp_path / "own").write_text(lines.replace("/a.slice/b c.scope", outside))
        assert host_memory_bytes() == 9000 - 100 + 7
