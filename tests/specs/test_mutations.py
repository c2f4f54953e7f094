"""Tests of the tests: a page, or code that reads it, that is wrong in one switch would not pass for right."""

import proofs
import pytest
import torch
from mutations import mutations
from proofs import TOLERANCE
from test_families import LENGTH, logits_of, some_tokens
from tiny_models import FAMILIES, relative_error

from lumen.checkpoint import load_model
from lumen.expert_spec import ExpertsSpec
from lumen.models.decoder import Decoder
from lumen.rope_spec import RopeSpec
from lumen.spec import LayerSpec, ModelSpec, load_family

CLEARLY = 0.05  # relative: what a wrong switch must at least do to the logits
# Sizes and names: a wrong one does not load, or is no matter of arithmetic. `kind` is seen in what a kind reads.
NO_SWITCHES = {
    *("name", "architecture", "dim", "heads", "kv_heads", "head_dim", "mlp_dim", "vocab", "context_length", "tied"),
    *("names", "lora_targets", "gguf", "chat", "config", "text_half", "layers", "kind", "rope", "sparse"),
    *("experts", "count", "width"),
    *("sections", "interleaved"),  # of no matter to a text; `tests/nn/test_rope.py` has positions of three parts
}
OFF = {  # what each switch is where it does nothing
    **{"norm_at": "before", "bias": frozenset(), "qk_norm": "none", "embed_scale": 1.0, "shared_gate": "none"},
    **{"factor": 1.0, "attention_factor": 1.0, "short": (), "long": ()},
    **dict.fromkeys(("window", "softcap", "logits_softcap", "shared"), 0),
    **dict.fromkeys(("low", "high", "trained_length", "beta_fast", "beta_slow"), 0),
}
READ_BY = {"truncate": ("yarn",), "factor": ("linear", "llama3", "yarn")}  # the kinds of rope that read a number at all


@proofs.of("mutations")
def test_every_wrong_switch_is_caught(tiny, shape):
    right = load_model(tiny(shape).folder)
    tokens = [some_tokens(1, LENGTH), some_tokens(1, 4)]  # the shorter one is within the length that longrope keeps

    def error(model: Decoder) -> float:
        return max(relative_error(logits_of(model, ids), logits) for ids, logits in zip(tokens, wanted, strict=True))

    with torch.no_grad():
        wanted = [tiny(shape).theirs(ids).logits for ids in tokens]
        assert error(right) <= TOLERANCE
        for what, spec in mutations(right.spec).items():
            wrong = Decoder(spec).eval()
            wrong.load_state_dict(right.state_dict(), strict=False)
            assert error(wrong) >= CLEARLY, what


@pytest.mark.parametrize("shape", FAMILIES)
def test_every_switch_of_a_page_has_a_mutation(tiny, shape):
    spec = load_family(tiny(shape).folder)
    own = switches(spec)
    wrong = [switches(wrong) for wrong in mutations(spec).values()]
    assert {name for name in own if all(other.get(name) == own[name] for other in wrong)} == set()


def switches(spec: ModelSpec) -> dict[str, list]:
    """Every number and word that the arithmetic of this model reads, of the model, its layers, ropes and experts."""
    ropes = [layer.rope for layer in spec.layers]
    records = {ModelSpec: [spec], LayerSpec: spec.layers, RopeSpec: ropes, ExpertsSpec: [spec.experts]}
    found = {
        name: [getattr(owner, name) for owner in owners if owner]
        for kind, owners in records.items()
        for name in kind.__dataclass_fields__
        if name not in NO_SWITCHES and spec.rope.kind in READ_BY.get(name, (spec.rope.kind,))
    }
    return {name: values for name, values in found.items() if any(value != OFF.get(name) for value in values)}
