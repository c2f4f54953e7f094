"""The generated page of families, and one family as text."""

import subprocess
import sys
from pathlib import Path

import pytest

from lumen.describe import describe_family, families_page, switches
from lumen.errors import ConfigError
from lumen.page import page_names, read_page

ROOT = Path(__file__).resolve().parent.parent

LLAMA_8B = {  # role: shape, checkpoint, GGUF; without .weight
    "embed": ((128256, 4096), "model.embed_tokens", "token_embd"),
    "norm": ((4096,), "model.norm", "output_norm"),
    "head": ((128256, 4096), "lm_head", "output"),
    "blocks.0.attn_norm": ((4096,), "model.layers.0.input_layernorm", "blk.0.attn_norm"),
    "blocks.0.attn.q": ((4096, 4096), "model.layers.0.self_attn.q_proj", "blk.0.attn_q"),
    "blocks.0.attn.k": ((1024, 4096), "model.layers.0.self_attn.k_proj", "blk.0.attn_k"),
    "blocks.0.attn.v": ((1024, 4096), "model.layers.0.self_attn.v_proj", "blk.0.attn_v"),
    "blocks.0.attn.o": ((4096, 4096), "model.layers.0.self_attn.o_proj", "blk.0.attn_output"),
    "blocks.0.mlp_norm": ((4096,), "model.layers.0.post_attention_layernorm", "blk.0.ffn_norm"),
    "blocks.0.mlp.gate": ((14336, 4096), "model.layers.0.mlp.gate_proj", "blk.0.ffn_gate"),
    "blocks.0.mlp.up": ((14336, 4096), "model.layers.0.mlp.up_proj", "blk.0.ffn_up"),
    "blocks.0.mlp.down": ((4096, 14336), "model.layers.0.mlp.down_proj", "blk.0.ffn_down"),
}


def script(name: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, ROOT / "scripts" / name, *arguments], capture_output=True, text=True)


def tensor_lines(text: str) -> list[str]:
    return text.split("\n\n")[2].splitlines()[1:]  # below the heading of the columns


def test_the_page_on_disk_begins_with_the_generated_table():
    found = (ROOT / "model_specs" / "README.md").read_text("utf-8")
    assert found.startswith(families_page()), "run scripts/families_table"


def test_the_check_of_the_script_agrees():
    assert script("families_table", "--check").returncode == 0


def test_the_table_has_a_column_for_every_family_and_marks_what_differs_from_llama():
    rows = [line.strip("| ").split(" | ") for line in families_page().splitlines() if line.startswith("|")]
    families = rows[0][1:]
    assert sorted(families) == page_names() and families[0] == "llama3.1"
    table = {row[0]: dict(zip(families, row[1:], strict=True)) for row in rows[2:]}
    assert table["attention.bias"]["qwen2"] == "**q k v**"
    assert table["attention.bias"]["qwen3"] == "none"
    assert table["attention.layers"]["gemma3"] == "**5×window full**"
    assert table["attention.softcap"]["gemma2"] == "**`attn_logit_softcapping`**"
    assert not [value for row in table.values() if "**" in (value := row["llama3.1"])]


def test_every_page_decides_the_same_switches():
    assert len({tuple(switches(read_page(name))) for name in page_names()}) == 1


def test_a_llama_block_and_what_surrounds_it_are_twelve_tensors_with_their_three_names():
    wanted = [
        [f"{role}.weight", str(shape), f"{checkpoint}.weight", f"{gguf}.weight"]
        for role, (shape, checkpoint, gguf) in LLAMA_8B.items()
    ]
    lines = tensor_lines(describe_family("llama3.1", "8b"))
    found = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]
    assert [row[:4] for row in found] == wanted
    assert [row[0] for row in found if row[4] == "rope_pairs"] == ["blocks.0.attn.q.weight", "blocks.0.attn.k.weight"]


def test_biases_are_shown_where_the_family_has_them():
    roles = [line.split()[0] for line in tensor_lines(describe_family("qwen2"))]
    assert [role for role in roles if role.endswith(".bias")] == [f"blocks.0.attn.{part}.bias" for part in "qkv"]


def test_a_family_that_ties_its_embedding_shows_no_head():
    assert "head.weight" not in describe_family("gemma2")


@pytest.mark.parametrize("name", page_names())
def test_every_family_is_described_at_each_of_its_sizes(name):
    for size, numbers in read_page(name).sizes.items():
        text = describe_family(name, size)
        assert f"({numbers['vocab']}, {numbers['dim']})" in text and f"All {numbers['layers']} blocks" in text


def test_an_unknown_family_exits_2_and_names_the_nearest():
    done = script("describe_family", "gema2")
    assert done.returncode == 2 and not done.stdout
    assert "Did you mean 'gemma2'?" in done.stderr and "Traceback" not in done.stderr


def test_an_unknown_size_is_refused_with_those_that_there_are():
    with pytest.raises(ConfigError, match=r"qwen2 has no size '8b'.*Known: 0\.5b, 1\.5b"):
        describe_family("qwen2", "8b")
