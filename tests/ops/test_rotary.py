"""Rotary positions: the kernels against the reference; turning back; a part of a head; positions of three parts."""

import pytest
import torch
from kernels import assert_kernel_equals_reference, needs_triton, random, relative_error, values_and_gradients
from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2_vl
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3_vl
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig

from lumen import ops
from lumen.errors import KernelError
from lumen.ops.rotary import rotary_angles, rotary_parts

B, T, H, K, E = 2, 19, 4, 2, 24


def tables(half):
    angles = random(B, T, half, seed=3, learns=False)
    return angles.cos(), angles.sin()


def test_turning_back_gives_what_was_there():
    x, (cos, sin) = random(B, T, H, E), tables(E // 2)
    torch.testing.assert_close(ops.rotary(ops.rotary(x, cos, sin), cos, -sin), x)


def test_what_lies_behind_the_tables_stays():
    x, (cos, sin) = random(B, T, H, E), tables(8)
    turned = ops.rotary(x, cos, sin)
    assert torch.equal(turned[..., 16:], x[..., 16:]) and not torch.equal(turned[..., :16], x[..., :16])


@needs_triton
@pytest.mark.parametrize("half", [E // 2, 8])
def test_values_and_gradients_match_the_reference(half):
    x, (cos, sin) = random(B, T, H, E), tables(half)
    assert_kernel_equals_reference(lambda: ops.rotary(x, cos, sin), [x])


@needs_triton
@pytest.mark.parametrize("half", [E // 2, 8])
def test_q_and_k_of_one_projection_match_the_reference(half):
    joined, (cos, sin) = random(B, T, (H + 2 * K) * E), tables(half)

    def turned():
        q, k, v = (part.view(B, T, -1, E) for part in (joined * 1).split([H * E, K * E, K * E], dim=-1))
        return ops.rotate_qk(q, k, v, cos, sin)

    assert_kernel_equals_reference(turned, [joined])


@needs_triton
def test_in_bf16_the_kernel_is_one_rounding_from_the_reference():
    joined, (cos, sin) = random(B, T, (H + 2 * K) * E).detach().bfloat16().requires_grad_(), tables(8)

    def turned():
        q, k, v = (part.view(B, T, -1, E) for part in (joined * 1).split([H * E, K * E, K * E], dim=-1))
        return ops.rotate_qk(q, k, v, cos, sin)

    found = values_and_gradients("triton", turned, [joined])
    wanted = values_and_gradients("reference", turned, [joined])
    for one, other in zip(found, wanted, strict=True):
        # the reference rounds both products and their sum; the interpreter cuts off where a GPU rounds the sum
        assert one.dtype == torch.bfloat16 and relative_error(one, other) <= 6e-3


# --- positions of three parts ----------------------------------------------------------------------------------------

# a text of three tokens, an image of 2 x 3 patches, and two more: time, height and width of each
IMAGE = [[3] * 6, [3, 3, 3, 4, 4, 4], [3, 4, 5] * 2]
POSITIONS = torch.tensor([[[*range(3), *part, 6, 7], [*range(20, 31)]] for part in IMAGE])  # (3, B, T)
THETA = 1e4
QWEN2 = (qwen2_vl, qwen2_vl.Qwen2VLRotaryEmbedding, Qwen2VLTextConfig)
QWEN3 = (qwen3_vl, qwen3_vl.Qwen3VLTextRotaryEmbedding, Qwen3VLTextConfig)
SECTIONS = {  # transformers' module and classes, and how the pairs of a head of 24 are divided
    "qwen2-vl": (*QWEN2, (3, 5, 4), False),
    "qwen3-vl": (*QWEN3, (6, 3, 3), True),
    "qwen3-vl, uneven": (*QWEN3, (5, 3, 4), True),
}


def own_tables(sections, interleaved, positions=POSITIONS):
    frequencies = 1.0 / THETA ** (torch.arange(0, E, 2).float() / E)
    angles = rotary_angles(positions, frequencies, rotary_parts(sections, interleaved))
    return angles.cos(), angles.sin()


def their_tables(embedding, config, sections):
    """(cos, sin) of transformers, each (B, T, E)."""
    settings = config(
        hidden_size=H * E, num_attention_heads=H, num_key_value_heads=K, head_dim=E,
        rope_parameters={"rope_type": "default", "rope_theta": THETA, "mrope_section": list(sections)},
    )  # fmt: skip
    return embedding(settings)(torch.zeros(1), POSITIONS)


@pytest.mark.parametrize("what", SECTIONS)
@pytest.mark.parametrize("implementation", ["reference", pytest.param("triton", marks=needs_triton)])
def test_three_parts_turn_q_and_k_as_in_transformers(what, implementation):
    module, embedding, config, sections, interleaved = SECTIONS[what]
    length = POSITIONS.shape[-1]
    q, k, v = (random(B, length, heads, E, seed=heads) for heads in (H, K, K))
    wanted = module.apply_rotary_pos_emb(q, k, *their_tables(embedding, config, sections), unsqueeze_dim=2)
    with ops.use(implementation):
        found = ops.rotate_qk(q * 1, k * 1, v, *own_tables(sections, interleaved))
    incoming = [random(*one.shape, seed=5, learns=False) for one in wanted]
    theirs = [*wanted, *torch.autograd.grad(wanted, [q, k], incoming)]
    ours = [*found[:2], *torch.autograd.grad(found[:2], [q, k], incoming)]
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("what", SECTIONS)
def test_each_part_matters_and_a_text_turns_as_by_one_position(what):
    *_, sections, interleaved = SECTIONS[what]
    cos, _ = own_tables(sections, interleaved)
    for part in range(3):
        moved = POSITIONS.clone()
        moved[part] += 1
        changed = (own_tables(sections, interleaved, moved)[0] - cos).abs().amax(dim=(0, 1)) > 1e-9
        assert torch.equal(changed, rotary_parts(sections, interleaved) == part)
    text = torch.arange(40).expand(2, 40)
    frequencies = 1.0 / THETA ** (torch.arange(0, E, 2).float() / E)
    alike = own_tables(sections, interleaved, text.expand(3, 2, 40))
    assert torch.equal(alike[0], rotary_angles(text, frequencies).cos())


def test_parts_lie_behind_each_other_or_take_turns():
    assert rotary_parts([1, 2, 3]).tolist() == [0, 1, 1, 2, 2, 2]
    assert rotary_parts([4, 2, 2], interleaved=True).tolist() == [0, 1, 2, 0, 1, 2, 0, 0]
    assert rotary_parts([16, 24, 24]).bincount().tolist() == [16, 24, 24]
    assert rotary_parts([24, 20, 20], interleaved=True).bincount().tolist() == [24, 20, 20]


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda: rotary_parts([16, 24]), "wants three numbers"),
        (lambda: rotary_parts([0, 0, 0]), "wants three numbers"),
        (lambda: rotary_parts([1, 5, 5], interleaved=True), r"\[1, 5, 5\] cannot take turns"),
        (lambda: rotary_angles(POSITIONS, torch.ones(12)), r"want the shape \(B, T\), found \(3, 2, 11\)"),
        (
            lambda: rotary_angles(POSITIONS[:2], torch.ones(12), rotary_parts([4, 4, 4])),
            r"shape \(3, B, T\), found \(2,",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(attempt, words):
    with pytest.raises(KernelError, match=words):
        attempt()
