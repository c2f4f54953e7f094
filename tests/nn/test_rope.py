"""Rotary positions against transformers: the tables of every kind, the part of a head that turns, and refusals."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding, apply_rotary_pos_emb
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

from lumen.errors import KernelError, SpecError
from lumen.export.gguf import told_of_llama_cpp
from lumen.nn.rope import Rotation, document_ends
from lumen.ops.rotary import rotary
from lumen.page import Page, RopePage, parse_page
from lumen.spec import Family, ModelSpec, load_family

TRAINED = 32  # tokens
SHORT, LONG = [1.0, 1.1, 1.3, 1.2, 1.5, 1.6], [1.0, 1.5, 2.5, 2.0, 6.0, 8.0]
SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": None,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED}
LONGROPE = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG}
PHI3 = {"original_max_position_embeddings": TRAINED, "partial_rotary_factor": 0.75, "sliding_window": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
TABLES = {  # what is special → the classes' first word and what config.json says
    "plain": ("Llama", {}),
    "linear": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama3": ("Llama", {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": TRAINED}}),
    "yarn": ("Qwen2", {"rope_scaling": YARN}),
    "yarn, steep": ("Qwen2", {"rope_scaling": YARN, "rope_theta": 5.0}),
    "yarn, one pair wide": ("Qwen2", {"rope_scaling": YARN | {"beta_fast": 1.0}, "rope_theta": 1e9}),
    "yarn, betas": ("Qwen2", {"rope_scaling": YARN | {"beta_fast": 2.0, "beta_slow": 0.25}, "rope_theta": 100.0}),
    "yarn, betas, not truncated": (
        "Qwen2",
        {"rope_scaling": YARN | {"beta_fast": 2.0, "beta_slow": 0.25, "truncate": False}, "rope_theta": 100.0},
    ),
    "yarn, attention factor": ("Qwen2", {"rope_scaling": YARN | {"attention_factor": 0.7}}),
    "yarn, mscales": ("Qwen2", {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 2.0}}),
    "yarn, one mscale": ("Qwen2", {"rope_scaling": YARN | {"mscale": 0.7}}),
    "yarn, factor 1": ("Qwen2", {"rope_scaling": YARN | {"factor": 1.0}}),
    "yarn, trained length left out": ("Qwen2", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}),
    "longrope": ("Phi3", PHI3 | {"rope_scaling": LONGROPE}),
    "longrope, all of a head": (
        "Phi3",
        {
            "original_max_position_embeddings": TRAINED,
            "sliding_window": 64,
            "rope_scaling": LONGROPE | {"short_factor": [*SHORT, 2.0, 3.0], "long_factor": [*LONG, 9.0, 9.5]},
        },
    ),
    "longrope, factor": ("Phi3", PHI3 | {"rope_scaling": LONGROPE | {"factor": 16.0}}),
    "longrope, attention factor": ("Phi3", PHI3 | {"rope_scaling": LONGROPE | {"attention_factor": 1.3}}),
    "longrope, no longer than trained": ("Phi3", PHI3 | {"rope_scaling": LONGROPE, "max_position_embeddings": 16}),
    "partial": ("Phi3", PHI3),
}
EMBEDDINGS = {"Llama": LlamaRotaryEmbedding, "Qwen2": Qwen2RotaryEmbedding, "Phi3": Phi3RotaryEmbedding}


def write_config(folder, word: str, settings: dict) -> transformers.PreTrainedConfig:
    # through JSON, since transformers writes into the dictionaries that it is given
    config = getattr(transformers, f"{word}Config")(**json.loads(json.dumps(SIZES | settings)))
    config.architectures = [f"{word}ForCausalLM"]
    config.save_pretrained(folder)
    return config


def bound(folder, word: str, settings: dict) -> ModelSpec:
    write_config(folder, word, settings)
    return load_family(folder)


def their_table(config: transformers.PreTrainedConfig, word: str, positions: torch.Tensor):
    """(cos, sin) of transformers, without the second half, which is the first once more."""
    tables = EMBEDDINGS[word](config)(torch.zeros(1), positions)
    return [table[..., : table.shape[-1] // 2] for table in tables]


@pytest.mark.parametrize("length", [1, TRAINED, TRAINED + 1, 200])
@pytest.mark.parametrize("what", TABLES)
def test_tables_equal_those_of_transformers(tmp_path, what, length):
    """Bit for bit; but llama3 mixes divisors, which a GGUF file wants, where transformers mixes frequencies."""
    word, settings = TABLES[what]
    config = write_config(tmp_path, word, settings)
    positions = torch.arange(length)[None]
    [found] = Rotation(load_family(tmp_path)).tables(positions).values()
    for ours, theirs in zip(found, their_table(config, word, positions), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5 if what == "llama3" else 0, rtol=0)


def test_the_cases_differ_from_each_other(tmp_path):
    """No switch of the table is close to doing nothing."""
    tables = {}
    for what, (word, settings) in TABLES.items():
        [(tables[what], _)] = Rotation(bound(tmp_path / what, word, settings)).tables(torch.arange(100)[None]).values()
    same = {
        (first, second)
        for first, second in itertools.combinations(tables, 2)
        if tables[first].shape == tables[second].shape and (tables[first] - tables[second]).abs().max() < 1e-3
    }
    # factor 1 slows nothing, and one of two mscales does not count
    assert same == {("plain", "yarn, factor 1"), ("yarn", "yarn, one mscale")}


def test_the_other_spellings_bind_to_the_same_rope(tmp_path):
    newer = bound(tmp_path, "Phi3", PHI3 | {"rope_scaling": LONGROPE})
    assert newer.rope.kind == "longrope" and newer.rope.turned == 12
    config = json.loads((tmp_path / "config.json").read_text())
    parameters = config.pop("rope_parameters")
    assert parameters.pop("partial_rotary_factor") == 0.75  # transformers 5 keeps it there
    parameters.pop("original_max_position_embeddings")
    for word in ("longrope", "su"):
        scaling = {"type": word, "short_factor": parameters["short_factor"], "long_factor": parameters["long_factor"]}
        classic = config | {"rope_scaling": scaling, "rope_theta": parameters["rope_theta"]}
        (tmp_path / "config.json").write_text(json.dumps(classic | {"partial_rotary_factor": 0.75}))
        assert load_family(tmp_path).rope == newer.rope


# --- which of longrope's lists ---------------------------------------------------------------------------------------


@pytest.fixture
def longrope(tmp_path) -> Rotation:
    return Rotation(bound(tmp_path, "Phi3", PHI3 | {"rope_scaling": LONGROPE}))


def table(rotation: Rotation, positions: torch.Tensor, reach: torch.Tensor | None = None) -> torch.Tensor:
    [(cos, sin)] = rotation.tables(positions, reach).values()
    return torch.stack([cos, sin])


def test_each_document_of_a_row_and_each_row_is_turned_as_if_alone(longrope):
    lengths = [5, TRAINED + 1, 1, TRAINED, 40]
    rows = torch.stack([torch.cat([torch.arange(length) for length in order]) for order in (lengths, lengths[::-1])])
    together = table(longrope, rows)
    for row, order in enumerate((lengths, lengths[::-1])):
        for part, length in zip(together[:, row].split(order, dim=1), order, strict=True):
            assert torch.equal(part, table(longrope, torch.arange(length)[None])[:, 0])


def test_a_piece_of_a_long_row_is_turned_as_the_whole_row_is(longrope):
    positions = torch.arange(50).expand(2, 50)
    reach = torch.tensor([[49], [20]])  # the second row is a short one, as far as anybody knows
    whole, piece = table(longrope, positions), table(longrope, positions[:, :10], reach)
    assert torch.equal(piece[:, 0], whole[:, 0, :10])
    assert torch.equal(piece[:, 1], table(longrope, positions[:1, :10])[:, 0])
    assert not torch.equal(piece[:, 0], piece[:, 1])


def test_left_padding_does_not_change_what_a_row_is_turned_by(longrope):
    padded = torch.tensor([[0, 0, 0, *range(TRAINED + 1)], [*range(TRAINED + 4)]])
    assert torch.equal(table(longrope, padded)[:, 0, 3:], table(longrope, torch.arange(TRAINED + 1)[None])[:, 0])


def test_document_ends():
    positions = torch.tensor([[0, 1, 2, 0, 0, 1], [4, 5, 6, 7, 8, 9]])
    assert document_ends(positions).tolist() == [[2, 2, 2, 0, 1, 1], [9] * 6]


# --- positions of three parts ----------------------------------------------------------------------------------------

# three words, an image of 2 x 2 patches, two words more; and a text, whose parts are equal
IMAGE = [[3, 3, 3, 3], [3, 3, 4, 4], [3, 4, 3, 4]]
THREE = torch.tensor([[[0, 1, 2, *part, 5, 6], [*range(9)]] for part in IMAGE])  # (3, B, T)


@pytest.mark.parametrize(
    ("word", "embedding", "sections"),
    [
        *[("Qwen2", Qwen2VLRotaryEmbedding, sections) for sections in ([2, 3, 3], [4, 2, 2], [1, 0, 7])],
        *[("Qwen3", Qwen3VLTextRotaryEmbedding, sections) for sections in ([4, 2, 2], [3, 3, 2], [5, 1, 2])],
    ],
)
def test_three_parts_give_the_tables_of_transformers_and_a_text_those_of_one_position(
    tmp_path, word, embedding, sections
):
    config = write_config(tmp_path, word, {"mrope_section": sections, "head_dim": 16})
    rotation = Rotation(load_family(tmp_path))
    assert rotation.ropes["full"].kind == "mrope" and rotation.ropes["full"].interleaved == (word == "Qwen3")
    config.rope_parameters["mrope_section"] = sections
    both = embedding(config)(torch.zeros(1), THREE)
    found = table(rotation, THREE)
    assert torch.equal(found, torch.stack([one[..., :8] for one in both]))
    plain = table(Rotation(bound(tmp_path / "plain", word, {"head_dim": 16})), THREE[0])
    assert torch.equal(found[:, 1], plain[:, 1])
    assert not torch.equal(found[:, 0], plain[:, 0])
    assert torch.equal(table(rotation, THREE[0]), plain)


def test_a_rope_of_one_position_refuses_three(tmp_path):
    with pytest.raises(KernelError, match=r"positions want the shape \(B, T\), found \(3, 2, 9\)"):
        Rotation(bound(tmp_path, "Qwen2", {})).tables(THREE)


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        ({"mrope_section": [2, 3, 4]}, "mrope_section wants numbers that sum to 8, one for each pair of the 16"),
        ({"mrope_section": [4, 4]}, "mrope_section wants three whole numbers"),
        ({"mrope_section": [9, -2, 1]}, "mrope_section wants three whole numbers"),
        ({"mrope_section": [2.0, 3, 3]}, "found [2.0, 3, 3]"),
        ({"mrope_section": [True, 3, 4]}, "mrope_section wants three whole numbers"),
        ({"mrope_section": [2, 3, 3], "mrope_interleaved": True}, "mrope_interleaved is True"),
        ({"mrope_section": [2, 3, 3], "rope_type": "yarn", "factor": 4.0}, "rope_scaling.rope_type is 'yarn'"),
        ({"rope_type": "mrope"}, "rope_type is 'mrope'; family 'qwen2' wants"),
    ],
)
def test_sections_that_do_not_divide_a_head_are_refused(tmp_path, rope, words):
    write_config(tmp_path, "Qwen2", {})
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"] |= rope
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SpecError) as refused:
        load_family(tmp_path)
    assert words in str(refused.value) and str(tmp_path / "config.json") in str(refused.value)


# --- the part of a head that turns -----------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [2, 12, 16])
def test_only_the_first_part_of_a_head_turns(width):
    random = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, 7, 3, 16, generator=random)
    angles = torch.randn(2, 7, width // 2, generator=random)
    cos, sin = angles.cos(), angles.sin()
    both = (torch.cat([half, half], dim=-1) for half in (cos, sin))
    wanted = apply_rotary_pos_emb(q, k, *both, unsqueeze_dim=2)
    for x, theirs in zip((q, k), wanted, strict=True):
        found = rotary(x, cos, sin)
        assert torch.equal(found, theirs)
        assert torch.equal(found[..., width:], x[..., width:])


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "settings", "changes", "words"),
    [
        ("Qwen2", {}, {"rope_type": "dynamic"}, "rope_type is 'dynamic'; family 'qwen2' wants 'default' or 'yarn'"),
        ("Qwen2", {"rope_scaling": YARN}, {"alpha": 3.0}, "alpha is 3.0, and the rope 'yarn' of family 'qwen2' reads"),
        ("Qwen2", {"rope_scaling": YARN}, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; family"),
        ("Qwen2", {"rope_scaling": YARN}, {"factor": None}, "wants 'rope_scaling.factor', found neither"),
        ("Qwen2", {"rope_scaling": YARN}, {"factor": 0.5}, "factor >= 1, found 10000.0 and 0.5"),
        ("Qwen2", {"rope_scaling": YARN}, {"beta_fast": 0.5}, "0 < beta_slow <= beta_fast"),
        ("Qwen2", {"rope_scaling": YARN}, {"truncate": "no"}, "rope_scaling.truncate wants true or false, found 'no'"),
        ("Qwen2", {"rope_scaling": YARN}, {"attention_factor": -1.0}, "attention_factor wants a number above 0"),
        ("Qwen2", {"rope_scaling": YARN}, {"original_max_position_embeddings": 1}, "was trained with, found 1."),
        ("Qwen2", {"rope_scaling": YARN}, {"original_max_position_embeddings": 32.5}, "trained with, found 32.5."),
        ("Qwen2", {"rope_scaling": YARN}, {"original_max_position_embeddings": 2**31}, "with, found 2147483648"),
        ("Qwen2", {"rope_scaling": YARN}, {"factor": math.nan}, "rope_scaling.factor wants a number that fp32"),
        ("Qwen2", {"rope_scaling": YARN}, {"factor": 10**400}, "found 10000000000000000000… of 401 digits"),
        ("Qwen2", {"rope_scaling": YARN}, {"beta_fast": math.inf}, "beta_fast wants a number that fp32 can hold"),
        ("Qwen2", {"rope_scaling": YARN}, {"beta_slow": 1e-320}, "beta_slow wants a number that fp32 can hold"),
        ("Qwen2", {}, {"rope_theta": math.nan}, "rope_theta wants a number that fp32 can hold, found nan"),
        ("Qwen2", {"rope_scaling": YARN}, {"rope_type": ["yarn"]}, "rope_type is ['yarn']; family 'qwen2' wants"),
        (
            "Qwen2",
            {"rope_scaling": YARN | {"factor": math.e}},
            {"mscale": 1.0, "mscale_all_dim": -10.0},
            "attention_factor wants a number above 0",
        ),
        ("Phi3", TABLES["longrope"][1], {"long_factor": [*LONG[:5], math.inf]}, "which fp32 can hold"),
        ("Phi3", TABLES["longrope"][1], {"long_factor": [*LONG[:5], 10**400]}, "which fp32 can hold"),
        ("Llama", TABLES["llama3"][1], {"mscale": 1.0}, "rope_scaling.mscale is 1.0, and the rope 'llama3'"),
        ("Phi3", TABLES["longrope"][1], {"long_factor": LONG[:5]}, "rope_scaling.long_factor wants 6 numbers"),
        ("Phi3", TABLES["longrope"][1], {"short_factor": "1.0"}, "short_factor wants a list of numbers above 0"),
        ("Phi3", TABLES["longrope"][1], {"short_factor": [*SHORT[:5], 0.0]}, "a list of numbers above 0"),
        ("Phi3", TABLES["longrope"][1], {"beta_fast": 32}, "beta_fast is 32, and the rope 'longrope'"),
        ("Phi3", PHI3, {"partial_rotary_factor": 0.7}, "partial_rotary_factor is 0.7; family 'phi3' turns 1"),
    ],
)
def test_a_rope_that_is_not_understood_is_refused(tmp_path, word, settings, changes, words):
    write_config(tmp_path, word, settings)
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"] |= changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SpecError) as refused:
        load_family(tmp_path)
    assert words in str(refused.value)
    assert "config.json" in str(refused.value)


def test_a_page_of_one_kind_refuses_a_config_of_another(tmp_path):
    """Whatever its [match] and [expect] let through."""
    config = json.loads(json.dumps(bound(tmp_path, "Qwen2", {}).config))
    page = Family.load("qwen2").page
    plain = Family(replace(page, rope={"full": RopePage(kind="plain", theta="rope_theta")}))
    assert plain.bind(config).rope.kind == "plain"
    with pytest.raises(SpecError, match="rope_type is 'dynamic'; family 'qwen2' wants 'default'"):
        plain.bind(config | {"rope_scaling": {"rope_type": "dynamic"}})


def test_a_yarn_context_is_as_long_as_yarn_makes_it(tmp_path):
    """Qwen 2.5's model card adds rope_scaling and leaves max_position_embeddings at the length without it."""
    settings = {"rope_scaling": YARN, "max_position_embeddings": TRAINED}
    assert bound(tmp_path, "Qwen2", settings).context_length == 4 * TRAINED
    assert bound(tmp_path, "Qwen2", settings | {"max_position_embeddings": 400}).context_length == 400


# --- which pages are refused -----------------------------------------------------------------------------------------

MROPE = 'sections = "mrope_section"\ninterleaved = true\n'
YARN_SIZES = 'factor = "rope_scaling.factor"\ntrained_length = "max_position_embeddings"\n'
WINDOW = "\n[rope.window]\ntheta = 1e4\n"


def page_with(rope: str) -> Page:
    """The page of Qwen3-VL with another rope."""
    text = (Path(__file__).parents[2] / "model_specs/qwen3-vl.toml").read_text()
    before, rest = text.split("[rope.full]")
    rest = rest[rest.index("[sizes]") :]
    return parse_page(f'{before}[rope.full]\ntheta = "rope_theta"\n{rope}\n{rest}', "made.toml")


@pytest.mark.parametrize(
    ("kinds", "more"),
    [('["mrope", "linear"]', 'factor = ["rope_scaling.factor", 1.0]'), ('["yarn", "mrope"]', YARN_SIZES)],
)
def test_beside_another_kind_mrope_alone_has_parts_that_take_turns(tmp_path, kinds, more):
    """llama.cpp turns every pair of the others."""
    write_config(tmp_path, "Qwen3", {"head_dim": 16})
    config = json.loads((tmp_path / "config.json").read_text()) | {"rope_theta": 1e4, "mrope_section": [4, 2, 2]}
    family = Family(page_with(f"kind = {kinds}\n{MROPE}{more}"))
    mrope = family.bind(config | {"rope_scaling": {"rope_type": "default"}})
    assert (mrope.rope.kind, mrope.rope.sections, mrope.rope.interleaved) == ("mrope", (4, 2, 2), True)
    assert told_of_llama_cpp(mrope)[0].startswith("Positions: 1 of the 8 pairs")
    other = next(word for word in ("linear", "yarn") if word in kinds)
    found = family.bind(config | {"rope_scaling": {"rope_type": other, "factor": 2.0}})
    assert (found.rope.kind, found.rope.sections, found.rope.interleaved) == (other, (), False)
    plain = replace(mrope.layers[0].rope, kind="plain", sections=())
    for spec in (found, replace(mrope, layers=(replace(mrope.layers[0], rope=plain),))):
        assert told_of_llama_cpp(spec) == ()


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        ('kind = "plain"\ninterleaved = true', "rope.full.interleaved is True, and no rope of kind 'plain' reads it"),
        ('kind = ["plain", "yarn"]\nsections = "x"', "sections is 'x', and no rope of kind 'plain' or 'yarn' reads it"),
        ('kind = "linear"\nbeta_fast = 4.0', "rope.full.beta_fast is 4.0, and no rope of kind 'linear'"),
        (f'kind = ["plain", "mrope"]\n{MROPE}', "names 'plain' and 'mrope', and config.json calls both 'default'"),
        (f'kind = ["mrope", "linear", "plain"]\n{MROPE}', "names 'mrope' and 'plain', and config.json calls both"),
        ('kind = ["yarn", "yarn"]', "names 'yarn' and 'yarn', and config.json calls both 'yarn'"),
        ("kind = []", "rope.full.kind wants a word or several, found none"),
        ('kind = "mrope"', "rope.full.sections wants a key of config.json, found none"),
        ('kind = "longrope"\nlong = "x"', "rope.full.short wants a key of config.json, found none"),
        ('kind = "plaim"', "rope.full.kind is 'plaim'; known: plain, linear"),
        (f'kind = "plain"\n{WINDOW}kind = ["plain"]', "rope.window.kind wants one word"),
        (f'kind = "plain"\n{WINDOW}kind = "plain"\ninterleaved = true', "rope.window.interleaved is True"),
        ('kind = "plain"\n[rope.widow]\ntheta = 1e4\nkind = "plain"', "rope for ['widow']; known: full, window"),
    ],
)
def test_a_page_whose_rope_no_config_could_choose_or_no_kind_could_read_is_refused(rope, words):
    with pytest.raises(SpecError) as refused:
        page_with(rope)
    assert words in str(refused.value) and str(refused.value).startswith("made.toml: ")
