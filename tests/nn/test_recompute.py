"""What blocks keep: which choice fits how much memory."""

import pytest

from lumen.nn.recompute import KEEP_ALL, Keeping, bytes_per_token, choose_keeping
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
    return sum(cost(keeping.level) for keeping in keepings if not keeping.moved)


def test_a_block_of_llama_8b_keeps_92_kilobytes_a_token():
    assert bytes_per_token(SPEC, "all") == 92 * 1024
    assert bytes_per_token(SPEC, "attention") == 36 * 1024
    assert bytes_per_token(SPEC, "input") == 8 * 1024


def test_all_is_kept_where_it_fits():
    assert choose_keeping(SPEC, TOKENS, 32 * cost("all"), may_move=True) == (KEEP_ALL,) * 32


def test_a_little_less_room_makes_few_blocks_compute_their_mlp_again():
    chosen = choose_keeping(SPEC, TOKENS, 32 * cost("all") - 1, may_move=True)
    assert chosen == (Keeping("attention"),) + (KEEP_ALL,) * 31


def test_much_less_room_moves_what_attention_made_to_the_host():
    chosen = choose_keeping(SPEC, TOKENS, 2 * cost("attention"), may_move=True)
    assert set(chosen) == {Keeping("attention", moved=True)}


def test_hardly_any_room_keeps_inputs_alone():
    assert set(choose_keeping(SPEC, TOKENS, 0, may_move=True)) == {Keeping("input", moved=True)}
    assert set(choose_keeping(SPEC, TOKENS, 0, may_move=False)) == {Keeping("input")}


@pytest.mark.parametrize("may_move", [False, True])
@pytest.mark.parametrize("share", [0.95, 0.7, 0.5, 0.35, 0.2])
def test_the_choice_fits_the_room(share, may_move):
    room = int(share * 32 * cost("all"))
    chosen = choose_keeping(SPEC, TOKENS, room, may_move=may_move)
    assert len(chosen) == 32 and on_device(chosen) <= room
    assert list(chosen) == sorted(chosen, key=lambda keeping: keeping == KEEP_ALL)  # the last blocks keep all
