"""Thirty steps of training, against trajectories that torch's AdamW and PEFT gave on the same batches."""

import json

import pytest
import torch
from safetensors.torch import load_file

from lumen.adapter import attach_lora, lora_pairs
from lumen.checkpoint import load_model
from lumen.config import Lora
from lumen.data.batch import Batch
from lumen.data.packing import pack
from lumen.objectives.sft import mean_loss, sft_loss
from lumen.optim import AdamW, clip_factor, gradient_norm
from lumen.text.conversation import Encoded
from lumen.text.tokenizer import load_tokenizer

ADAMW = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}


@pytest.fixture
def golden(shared_data):
    folder = shared_data / "models/stories260K"
    batches = json.loads((folder / "golden_train/batches.json").read_text())
    return folder, torch.tensor(batches), json.loads((folder / "golden_train/golden_train.json").read_text())


def batch_of(tokens):
    target = torch.cat([tokens[:, 1:], torch.full((len(tokens), 1), -100)], dim=1)
    position = torch.arange(tokens.shape[1]).expand_as(tokens)
    return Batch(tokens=tokens, target=target, position=position, document=torch.zeros_like(tokens))


def trajectory(model, batches, lr):
    """(loss, gradient norm) of every step, the model trained in place."""
    optimizer = AdamW(model.named_parameters(), **ADAMW)
    line = []
    for tokens in batches:
        loss = sft_loss(model, batch_of(tokens))
        mean = loss.total / loss.count
        mean.backward()
        norm = gradient_norm(optimizer.parameters.values())
        optimizer.step(lr, clip_factor(norm, 1.0))
        optimizer.zero_grad()
        line.append((mean.item(), norm.item()))
    return torch.tensor(line).T


def test_full_fine_tuning_follows_the_golden_trajectory(golden):
    folder, batches, wanted = golden
    model = load_model(folder).requires_grad_(True).train()
    losses, norms = trajectory(model, batches, wanted["full"]["lr"])
    assert (losses - torch.tensor(wanted["full"]["loss"])).abs().max() <= 1e-4
    torch.testing.assert_close(norms, torch.tensor(wanted["full"]["grad_norm"]), rtol=1e-3, atol=0)


def test_lora_follows_the_golden_trajectory_to_the_golden_adapter(golden):
    folder, batches, wanted = golden
    model = load_model(folder)
    attach_lora(model, Lora(rank=8, alpha=16.0))
    place(model, load_file(folder / "golden_train/lora_init.safetensors"))
    losses, norms = trajectory(model.train(), batches, wanted["lora"]["lr"])
    assert (losses - torch.tensor(wanted["lora"]["loss"])).abs().max() <= 1e-4
    torch.testing.assert_close(norms, torch.tensor(wanted["lora"]["grad_norm"]), rtol=1e-3, atol=0)
    final = load_file(folder / "golden_train/lora_final.safetensors")
    for key, value in keyed(model).items():
        torch.testing.assert_close(value, find(final, key), rtol=1e-3, atol=1e-4)


def keyed(model):
    """PEFT module path and half → parameter."""
    names = model.spec.names
    return {
        f"{names.by_role(role).checkpoint}.lora_{half.upper()}": getattr(pair, half).detach()
        for role, pair in lora_pairs(model).items()
        for half in "ab"
    }


def find(tensors, key):
    matches = [value for name, value in tensors.items() if key in name]
    assert len(matches) == 1, key
    return matches[0]


def place(model, tensors):
    with torch.no_grad():
        for key, value in keyed(model).items():
            value.copy_(find(tensors, key))


@pytest.mark.slow
def test_losses_on_two_texts_equal_the_golden_ones(shared_data):
    folder = shared_data / "models/stories260K"
    wanted = json.loads((folder / "golden_loss.json").read_text())
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    stories = (shared_data / "text/tinystories_part1.txt").read_text("utf-8").split("<|endoftext|>")
    documents = [[tokenizer.bos_id, *tokenizer.encode(story.strip())][:512] for story in stories[:300]]
    assert mean(model, documents) == pytest.approx(wanted["tinystories_part1_first300docs"]["nats"], abs=1e-5)
    ids = tokenizer.encode((shared_data / "text/tinyshakespeare.txt").read_text("utf-8")[:60_000])
    windows = [[tokenizer.bos_id, *ids[start : start + 255]] for start in range(0, len(ids) - 254, 255)]
    assert len(windows) == wanted["tinyshakespeare_first60000chars"]["windows"]
    assert mean(model, windows) == pytest.approx(wanted["tinyshakespeare_first60000chars"]["nats"], abs=1e-5)


def mean(model, documents):
    """Nats per predicted token, the documents packed as they are for training."""
    encoded = [Encoded(ids=ids, learn=[True] * len(ids)) for ids in documents]
    return mean_loss(model, pack(encoded, 512), batch_size=8)
