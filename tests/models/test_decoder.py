"""The decoder with itself: a cache, recomputed blocks; and with golden logits of pretrained weights.

What it computes is held against transformers in `tests/specs`, for every family.
"""

import json

import numpy as np
import pytest
import torch
from tiny_models import family, llama, relative_error

from lumen import ops
from lumen.adapter import attach_lora
from lumen.checkpoint import load_model
from lumen.config import Lora
from lumen.nn import recompute
from lumen.nn.cache import KVCache
from lumen.nn.layers import MLP
from lumen.nn.recompute import Keeping

TOLERANCE = 1e-5  # relative, fp32


def positions_of(tokens):
    return torch.arange(tokens.shape[1]).expand_as(tokens)


@pytest.mark.parametrize("implementation", ["torch", "reference"])
def test_decoding_with_a_cache_equals_one_pass(tmp_path, implementation):
    llama(tmp_path)
    model = load_model(tmp_path)
    tokens = torch.randint(257, (2, 12))
    whole = model(tokens, positions_of(tokens))
    cache = KVCache(model.spec, 2, 12, torch.float32, torch.device("cpu"))
    with ops.use(implementation, "attention"):
        parts = [model(tokens[:, :7], positions_of(tokens)[:, :7], None, cache)]
        parts += [model(tokens[:, t : t + 1], positions_of(tokens)[:, t : t + 1], None, cache) for t in range(7, 12)]
    assert relative_error(torch.cat(parts, dim=1), whole) < TOLERANCE


def test_recomputing_blocks_gives_the_same_gradients_bit_for_bit(tmp_path):
    llama(tmp_path)
    model = load_model(tmp_path).requires_grad_(True).train()
    tokens = torch.randint(257, (2, 9))
    gradients = []
    for level in ("all", "attention", "input"):
        model.keeping = (Keeping(level),) * len(model.blocks)
        model.zero_grad()
        model(tokens, positions_of(tokens)).square().sum().backward()
        gradients.append(
            {role: parameter.grad for role, parameter in model.named_parameters() if parameter.grad is not None}
        )
    assert all(torch.equal(gradients[0][role], other[role]) for other in gradients[1:] for role in gradients[0])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_an_mlp_recomputed_in_lots_has_the_same_gradients_and_runs_no_more_often(tmp_path, monkeypatch, dropout):
    llama(tmp_path)
    model = load_model(tmp_path)
    attach_lora(model, Lora(rank=4, dropout=dropout))
    for name, parameter in model.train().named_parameters():
        if name.endswith("lora.b"):
            torch.nn.init.normal_(parameter)
    tokens = torch.randint(257, (2, 9), generator=torch.Generator().manual_seed(0))
    forward, rows = MLP.forward, []
    monkeypatch.setattr(MLP, "forward", lambda self, x, *norms: (rows.append(len(x)), forward(self, x, *norms))[1])

    def gradients(level, most):
        """At most so many rows in a lot; what is dropped hangs on the lots, and not on the level."""
        monkeypatch.setattr(recompute, "MOST_ROWS", most)
        model.keeping = (Keeping(level),) * len(model.blocks)
        torch.manual_seed(1)
        rows.clear()
        model.zero_grad()
        model(tokens, positions_of(tokens)).square().sum().backward()
        return {role: parameter.grad for role, parameter in model.named_parameters() if parameter.grad is not None}

    wanted = gradients("attention", 7) if dropout else gradients("all", 18)
    assert len(wanted) == 14 * len(model.blocks)
    for level in ("attention", "input"):
        found = gradients(level, 7)
        assert rows == [6] * 6 * len(model.blocks)  # three lots, forward and once more
        assert all(relative_error(found[role], wanted[role]) < TOLERANCE for role in wanted)


@pytest.mark.parametrize("shape", ["gemma2", "mixtral"])  # norms around each half; experts
def test_all_weights_learn_the_same_in_lots_also_from_a_retained_graph(tmp_path, monkeypatch, shape):
    family(tmp_path, shape)
    model = load_model(tmp_path).requires_grad_(True).train()
    tokens = torch.randint(1, 200, (2, 9), generator=torch.Generator().manual_seed(0))

    def gradients(level):
        model.keeping = (Keeping(level),) * len(model.blocks)
        total = model(tokens, positions_of(tokens)).square().sum()
        for again in (True, False):
            model.zero_grad()
            total.backward(retain_graph=again)
        return {role: parameter.grad for role, parameter in model.named_parameters() if parameter.grad is not None}

    wanted = gradients("all")
    monkeypatch.setattr(recompute, "MOST_ROWS", 5)
    for level in ("attention", "input"):
        found = gradients(level)
        assert found.keys() == wanted.keys()
        assert all(relative_error(found[role], wanted[role]) < TOLERANCE for role in wanted)


def test_pretrained_logits_equal_the_golden_ones(shared_data):
    folder = shared_data / "models/stories260K"
    ids = json.loads((folder / "golden_greedy.json").read_text())["ids"]
    wanted = torch.from_numpy(np.load(folder / "golden_logits.npy"))
    tokens = torch.tensor(ids[: len(wanted)])[None]
    model = load_model(folder)
    found = model.logits(model(tokens, positions_of(tokens)))[0]
    assert (found - wanted).abs().max() <= 5e-5
