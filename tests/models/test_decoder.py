"""The decoder against transformers: logits, all gradients, long positions, packed rows."""

import json

import numpy as np
import pytest
import torch
from tiny_models import LLAMAS, llama, relative_error
from torch.nn import functional as F

from lumen import ops
from lumen.checkpoint import load_model
from lumen.nn.cache import KVCache

TOLERANCE = 1e-5  # relative, fp32


def positions_of(tokens):
    return torch.arange(tokens.shape[1]).expand_as(tokens)


@pytest.mark.parametrize("shape", LLAMAS)
def test_logits_and_all_gradients_equal_transformers(tmp_path, shape):
    theirs = llama(tmp_path, **LLAMAS[shape])
    ours = load_model(tmp_path).requires_grad_(True)
    tokens = torch.randint(257, (2, 37), generator=torch.Generator().manual_seed(1))
    wanted = theirs(tokens).logits
    found = ours.logits(ours(tokens, positions_of(tokens)))
    assert relative_error(found, wanted) < TOLERANCE
    for logits in (wanted, found):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    their_gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    own = dict(ours.named_parameters())
    names = {name.role: name.checkpoint for name in ours.spec.tensors()}
    assert {names[role] for role in own} == set(their_gradients)
    for role, parameter in own.items():
        assert relative_error(parameter.grad, their_gradients[names[role]]) < TOLERANCE, role


@pytest.mark.parametrize("shape", ["llama3_rope", "linear_rope", "plain"])
def test_positions_past_the_original_context_equal_transformers(tmp_path, shape):
    theirs = llama(tmp_path, **LLAMAS[shape])
    ours = load_model(tmp_path)
    tokens = torch.randint(257, (1, 300), generator=torch.Generator().manual_seed(2))
    assert relative_error(ours.logits(ours(tokens, positions_of(tokens))), theirs(tokens).logits) < TOLERANCE


def test_documents_of_a_packed_row_equal_each_document_alone(tmp_path):
    llama(tmp_path, **LLAMAS["llama3_rope"])
    model = load_model(tmp_path)
    lengths = [5, 11, 1, 20]
    documents = [torch.randint(257, (1, length)) for length in lengths]
    tokens = torch.cat(documents, dim=1)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    document = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    packed = model(tokens, positions, document).split(lengths, dim=1)
    for alone, together in zip(documents, packed, strict=True):
        assert relative_error(together, model(alone, positions_of(alone))) < TOLERANCE


@pytest.mark.parametrize("implementation", ["torch", "reference"])
def test_decoding_with_a_cache_equals_one_pass(tmp_path, implementation):
    llama(tmp_path)
    model = load_model(tmp_path)
    tokens = torch.randint(257, (2, 12))
    whole = model(tokens, positions_of(tokens))
    cache = KVCache(model.spec, 2, 12, torch.float32, torch.device("cpu"))
    with ops.use(implementation):
        parts = [model(tokens[:, :7], positions_of(tokens)[:, :7], None, cache)]
        parts += [model(tokens[:, t : t + 1], positions_of(tokens)[:, t : t + 1], None, cache) for t in range(7, 12)]
    assert relative_error(torch.cat(parts, dim=1), whole) < TOLERANCE


def test_recomputing_blocks_gives_the_same_gradients_bit_for_bit(tmp_path):
    llama(tmp_path)
    model = load_model(tmp_path).requires_grad_(True).train()
    tokens = torch.randint(257, (2, 9))
    gradients = []
    for recompute in (False, True):
        model.recompute = recompute
        model.zero_grad()
        model(tokens, positions_of(tokens)).square().sum().backward()
        gradients.append(
            {role: parameter.grad for role, parameter in model.named_parameters() if parameter.grad is not None}
        )
    assert all(torch.equal(gradients[0][role], gradients[1][role]) for role in gradients[0])


def test_pretrained_logits_equal_the_golden_ones(shared_data):
    folder = shared_data / "models/stories260K"
    ids = json.loads((folder / "golden_greedy.json").read_text())["ids"]
    wanted = torch.from_numpy(np.load(folder / "golden_logits.npy"))
    tokens = torch.tensor(ids[: len(wanted)])[None]
    model = load_model(folder)
    found = model.logits(model(tokens, positions_of(tokens)))[0]
    assert (found - wanted).abs().max() <= 5e-5
