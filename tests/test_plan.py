"""What a plan foretells, and that a run arranges itself as its plan says; the figures themselves need a GPU."""

import json
from dataclasses import replace

import pytest
import torch
from tiny_models import llama

from lumen.checkpoint import load_model
from lumen.config import Lora, Model, RunConfig, Train
from lumen.data.batch import stack
from lumen.data.packing import pack
from lumen.nn.recompute import KEEP_ALL, Keeping, bytes_per_token
from lumen.plan import _optimizer, _passes, arrange, block_weights, kept_bytes, main, working_bytes
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


@pytest.mark.parametrize("dora", [False, True])
def test_what_is_chosen_fits_and_dora_keeps_more(dora):
    for gib in (1, 3, 8, 15, 20, 30, 60):
        told = config(lora={"dora": dora}, train={"offload": False})
        keeping, _ = arrange(SPEC, told, TOKENS, gib << 30)
        if any(each.level != "input" for each in keeping):  # less than that there is not
            assert needed(keeping, dora) <= gib << 30
    assert needed((ALL,) * 32, True) > needed((ALL,) * 32, False) and needed((Keeping("input"),) * 32, True) == needed(
        (Keeping("input"),) * 32, False
    )


def test_blocks_that_are_moved_count_while_they_go():
    moved = Keeping("attention", moved=True)
    assert kept_bytes(SPEC, config(), (moved,) * 31 + (ALL,), TOKENS) == TOKENS * (
        2 * bytes_per_token(SPEC, "attention") + bytes_per_token(SPEC, "all")
    )


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
    assert (plan["device"], plan["steps"], plan["step_s"], plan["host_bytes"]) == ("CPU", 6, None, 0)
    assert plan["peak_bytes"] > plan["weights_bytes"] + plan["kept_bytes"] > 0


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
