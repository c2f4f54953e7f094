"""What a plan foretells, and that a run arranges itself as its plan says; the figures themselves need a GPU."""

import json
from dataclasses import replace
from itertools import product

import pytest
import torch
from tiny_models import llama
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lumen import ops, plan
from lumen.checkpoint import load_model
from lumen.config import Lora, Model, RunConfig, Train
from lumen.data.batch import stack
from lumen.data.packing import pack
from lumen.models.decoder import Decoder
from lumen.nn.recompute import KEEP_ALL, MOST_ROWS, Keeping, bytes_per_token
from lumen.ops.rotary import _rotary_kernel
from lumen.plan import _kept_bytes, _optimizer, _passes, arrange, block_weights, kept_bytes, main, working_bytes
from lumen.probe import Probe, Share, _depths, probe
from lumen.spec import Family
from lumen.text.conversation import Encoded

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "hidden_size": 4096, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 5e5, "rope_scaling": {"rope_type": "default"},
}  # fmt: skip
SPEC = Family.load("llama3").bind(LLAMA_8B)
TOKENS = 8192
ALL, ATTENTION = Keeping(), Keeping("attention")


def config(*, train: dict | None = None, lora: dict | None = None, model: dict | None = None) -> RunConfig:
    return RunConfig(model=Model(**model or {}), lora=Lora(**lora or {}), train=Train(**train or {}))


def needed(keeping, dora: bool = False) -> int:
    """Bytes of device memory under which `keeping` just fits."""
    return kept_bytes(SPEC, config(lora={"dora": dora}), keeping, TOKENS) + working_bytes(SPEC, TOKENS)


def test_weights_are_unpacked_for_good_where_all_is_kept_and_room_is_left():
    room = needed((ALL,) * 32) + 2 * 32 * block_weights(SPEC)
    assert arrange(SPEC, config(), TOKENS, room + 1) == ((ALL,) * 32, True)
    assert arrange(SPEC, config(), TOKENS, room - 1) == ((ALL,) * 32, False)
    assert arrange(SPEC, config(model={"nf4": False}), TOKENS, room + 1) == ((ALL,) * 32, False)
    assert arrange(SPEC, config(model={"fp8": True}), TOKENS, room + 1) == ((ALL,) * 32, False)


def test_what_is_asked_for_is_kept_whatever_the_room():
    assert arrange(SPEC, config(train={"keep": "attention"}), TOKENS, 0) == ((ATTENTION,) * 32, False)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("dora", [False, True])
def test_what_is_chosen_fits(dora, itemsize, monkeypatch):
    told, found = config(lora={"dora": dora}), set()
    for tokens, gib, host_gib in product(
        (2048, 8192, 16384, 32768), (1, 3, 4.5, 6, 8, 11, 15, 20, 30, 45, 60), (0, 20, 400)
    ):
        monkeypatch.setattr(plan, "host_memory_bytes", lambda given=host_gib: given << 30)
        keeping, _ = arrange(SPEC, told, tokens, int(gib * 2**30), itemsize)
        taken = kept_bytes(SPEC, told, keeping, tokens, itemsize)
        taken += working_bytes(SPEC, tokens, itemsize, whole=ALL in keeping)
        if any(each.level != "input" for each in keeping):  # less than that there is not
            assert taken <= gib * 2**30
        found |= set(keeping)
    assert len(found) == 5  # each way that there is


def test_dora_keeps_more():
    assert needed((ALL,) * 32, True) > needed((ALL,) * 32, False)
    assert needed((Keeping("input"),) * 32, True) == needed((Keeping("input"),) * 32, False)


def test_blocks_that_are_moved_count_while_they_go():
    moved = Keeping("attention", moved=True)
    assert kept_bytes(SPEC, config(), (moved,) * 31 + (ALL,), TOKENS) == TOKENS * (
        2 * bytes_per_token(SPEC, "attention") + bytes_per_token(SPEC, "all")
    )


class Live(TorchDispatchMode):
    """Counts the bytes of the storages that operations made and that still live, and the most of them at a time."""

    def __init__(self):
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        result = operation(*arguments, **(options or {}))
        for storage in [each.untyped_storage() for each in tree_leaves(result) if isinstance(each, torch.Tensor)]:
            self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.most = max(self.most, self.now())
        return result

    def now(self) -> int:
        self.made = {key: one for key, one in self.made.items() if not one[0].expired()}
        return sum(size for _, size in self.made.values())


WIDE_HEADS = {
    "dim": 16, "heads": 4, "kv_heads": 2, "head_dim": 32, "mlp_dim": 16, "vocab": 8, "layers": SPEC.layers[:2],
}  # fmt: skip
ROWS = 4096


def lived(spec, level: str) -> tuple[int, int]:
    """Bytes a token that live behind the forward pass of two blocks, and at the most in their backward pass."""
    torch.manual_seed(0)
    model = Decoder(spec).train().requires_grad_(False)
    model.keeping = (Keeping(level),) * 2
    places = torch.arange(ROWS).view(1, -1)
    shared = model._places(places, None, None)
    x = torch.randn(1, ROWS, spec.dim, requires_grad=True)
    with ops.use("triton"), Live() as live:
        y = model._trained(x * 1, shared)
        behind, live.most = live.now() - y.nbytes, 0
        y.backward(torch.ones(()).expand_as(y))
    return behind // ROWS, live.most // ROWS


@pytest.mark.parametrize("qk_norm", ["", "head"])
def test_heads_wider_than_the_model_keep_and_work_in_what_is_counted(qk_norm, monkeypatch):
    # what kernels compute is no matter here, and the interpreter is slow
    monkeypatch.setattr(type(_rotary_kernel), "__getitem__", lambda kernel, grid: lambda *arguments, **options: None)
    spec = replace(SPEC, **WIDE_HEADS, qk_norm=qk_norm)
    for level in ("attention", "input"):
        behind, most = lived(spec, level)
        kept = 2 * bytes_per_token(spec, level, 4)
        assert kept <= behind <= kept + (148 if qk_norm else 100)  # sums of scores; inverse roots, of each head too
        if level == "input":
            working = working_bytes(spec, ROWS, 4) / ROWS
            # two rows of width H·E are cuDNN's, and with per-head norms half a row of all heads: it does not run here
            assert most - kept <= working <= 1.25 * (most - kept)


def test_a_llama_works_in_what_was_measured():
    for tokens, measured in ((MOST_ROWS, 151_000), (345_000, 82_000)):
        weights = 4 * SPEC.dim * SPEC.mlp_dim  # unpacked
        assert (working_bytes(SPEC, tokens) - weights) / tokens == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("dora", [False, True])
def test_what_is_moved_fits_the_hosts_memory(dora, monkeypatch):
    monkeypatch.setattr(plan, "host_memory_bytes", lambda: 90 << 30)
    told = config(lora={"dora": dora}, model={"nf4": True})

    def on_host(tokens: int, **options) -> int:
        keeping, _ = arrange(SPEC, told, tokens, 60 << 30, **options)
        return tokens * sum(_kept_bytes(SPEC, told, each, 2) for each in keeping if each.moved)

    for tokens in (65_536, 131_072, 262_144):
        assert 0 < on_host(tokens) <= 0.8 * (90 << 30)
        assert on_host(tokens, pinned_bytes=20 << 30) <= 0.8 * (70 << 30)


def test_paged_averages_count_for_the_host():
    plain = _optimizer(config(train={"optimizer_bits": 8}), 1000, True)
    assert plain == (8000 + 2030, 0)
    assert _optimizer(config(train={"optimizer_bits": 8, "optimizer_paged": True}), 1000, True) == (8000, 2030)
    assert _optimizer(config(train={"optimizer_paged": True}), 1000, False) == (16_000, 0)


def test_a_narrower_batch_is_a_part_of_a_pass():
    encoded = [Encoded([1] * n, [True] * n) for n in (4, 4, 8, 8)]
    whole = config(train={"batch_size": 1, "accumulate": 2})
    assert _passes(whole, pack(encoded, 8)) == 2
    alone = replace(whole, data=replace(whole.data, packing=False))
    assert _passes(alone, pack(encoded, 8, packing=False)) == 2 * (4 + 4 + 8 + 8) / 4 / 8
    assert _passes(replace(alone, train=Train(batch_size=4, accumulate=8)), pack(encoded, 8, packing=False)) == 1


def test_a_peak_is_at_the_top_or_where_more_is_worked_in():
    found = Probe(
        block={ALL: Share(seconds=1.0, size_bytes=100), ATTENTION: Share(seconds=1.5, size_bytes=40)},
        rest={ALL: Share(seconds=3.0, size_bytes=50), ATTENTION: Share(seconds=3.5, size_bytes=180)},
        moved_bytes=0,
        fixed_bytes=7,
    )
    assert found.peak_bytes((ALL,) * 4) == 450 + 7
    assert found.peak_bytes((ATTENTION,) * 3 + (ALL,)) == max(220 + 50, 120 + 180) + 7
    assert found.peak_bytes((ATTENTION, ALL, ALL, ALL)) == 340 + 50 + 7
    assert found.seconds((ATTENTION, ALL, ALL, ALL)) == 1.5 + 3 + 3


def test_what_is_on_its_way_counts_at_the_top():
    moved = Keeping("attention", moved=True)
    found = Probe(
        block={ALL: Share(seconds=1.0, size_bytes=100), moved: Share(seconds=1.5, size_bytes=0)},
        rest={ALL: Share(seconds=3.0, size_bytes=50), moved: Share(seconds=3.5, size_bytes=120)},
        moved_bytes=40,
        fixed_bytes=0,
    )
    assert found.peak_bytes((moved, moved, ALL, ALL)) == 200 + 50 + 2 * 40
    assert found.peak_bytes((moved,) * 4) == 120


def test_depths_differ_by_one_period_of_the_layers():
    full = SPEC.layers[0]
    window = replace(full, kind="window", window=512)
    assert _depths((full,) * 8, KEEP_ALL) == (1, 2)
    assert _depths((full,) * 8, Keeping("input", moved=True)) == (3, 4)
    assert _depths((window, full) * 4, KEEP_ALL) == (2, 4)
    assert _depths((window, window, full) * 4, Keeping("input", moved=True)) == (3, 6)


def test_the_plan_of_a_run_on_a_cpu_tells_its_steps_and_no_time(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"prompt": "one two", "completion": " three"}\n' * 6)
    told = [f"data.train={tmp_path}/a.jsonl", "data.eval=", "train.eval_every=0", "data.packing=false"]
    split = ["model.device=cpu", "train.epochs=2", "train.batch_size=2", "train.accumulate=1", "train.steps=0"]
    assert main(["lumen-demo", *told, *split, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["warning"] == ""
    assert (plan["device"], plan["steps"], plan["step_s"], plan["host_bytes"]) == ("CPU", 6, None, 0)
    assert plan["peak_bytes"] > plan["weights_bytes"] + plan["kept_bytes"] > 0


def test_a_bound_that_binds_nothing_is_told(capsys):
    assert main(["lumen-demo", "model.device=cpu", "train.memory_gib=1"]) == 0
    assert "warning   train.memory_gib = 1 bounds the memory of a GPU" in capsys.readouterr().out


@pytest.mark.parametrize("nf4", [True, False])
def test_a_probe_runs_what_the_run_will(tmp_path, nf4):
    llama(tmp_path)
    spec = load_model(tmp_path).spec
    batch = stack(pack([Encoded([5] * 9, [True] * 9), Encoded([6] * 5, [True] * 5)], 16).rows, 16)
    told = config(model={"nf4": nf4}, lora={"rank": 2, "dora": True, "dropout": 0.1})
    place = {"holds": False, "device": torch.device("cpu"), "dtype": torch.float32}
    ways = (ATTENTION, ALL)
    found = probe(spec, told, batch, ways, 0, **place)
    assert set(found.block) == set(found.rest) == set(ways)
    one = replace(spec, layers=spec.layers[:1])
    assert probe(one, told, batch, (ALL,), 0, **place) is None, "one layer tells no difference"
