"""Adapters against PEFT: what each writes, the other reads, with equal logits."""

import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import llama, relative_error

from lumen.adapter import attach_lora, disabled, load_adapter, lora_pairs, save_adapter
from lumen.checkpoint import load_model
from lumen.config import Lora
from lumen.errors import CheckpointError, ConfigError

TOKENS = torch.randint(257, (2, 20), generator=torch.Generator().manual_seed(5))
POSITIONS = torch.arange(20).expand(2, 20)


def logits(model):
    return model.logits(model(TOKENS, POSITIONS))


def randomize(model):
    """B starts at zero, which would make any mistake invisible."""
    with torch.no_grad():
        for pair in lora_pairs(model).values():
            pair.b.normal_(0, 0.1)


@pytest.mark.parametrize(
    "lora",
    [Lora(rank=4, alpha=8.0), Lora(rank=4, alpha=8.0, rslora=True), Lora(rank=2, targets=("attn.q", "mlp.down"))],
)
def test_peft_loads_what_lumen_saves_with_equal_logits(tmp_path, lora):
    llama(tmp_path / "base")
    model = load_model(tmp_path / "base")
    attach_lora(model, lora)
    randomize(model)
    (tmp_path / "adapter").mkdir()
    save_adapter(model, tmp_path / "adapter", lora, str(tmp_path / "base"))
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert relative_error(logits(model), theirs(TOKENS).logits) < 1e-5
    again = load_model(tmp_path / "base")
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 8},
        {"r": 4, "lora_alpha": 8, "use_rslora": True},
        {"r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 3}},
        {"r": 4, "lora_alpha": 8, "alpha_pattern": {r"layers\.0\.self_attn\.[qk]_proj": 64}},
    ],
)
def test_lumen_loads_what_peft_saves_with_equal_logits(tmp_path, settings):
    base = llama(tmp_path / "base")
    config = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False, **settings)
    theirs = peft.get_peft_model(base, config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    model = load_model(tmp_path / "base")
    load_adapter(model, tmp_path / "adapter")
    assert relative_error(logits(model), theirs(TOKENS).logits) < 1e-5


def test_the_trained_adapter_of_the_reference_data_loads(shared_data):
    folder = shared_data / "models/stories260K"
    model = load_model(folder)
    base = logits(model)
    load_adapter(model, folder / "golden_train/peft_adapter")
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, folder / "golden_train/peft_adapter").eval()
    assert relative_error(logits(model), theirs(TOKENS).logits) < 1e-5
    assert relative_error(logits(model), base) > 0.1


def test_a_fresh_adapter_changes_nothing_and_only_it_learns(tmp_path):
    llama(tmp_path)
    model = load_model(tmp_path)
    before = logits(model)
    pairs = attach_lora(model, Lora(rank=3))
    assert torch.equal(logits(model), before)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == {f"{role}.lora.{half}" for role in pairs for half in "ab"}
    assert {parameter.dtype for pair in pairs.values() for parameter in pair.parameters()} == {torch.float32}


def test_targets_are_roles_and_patterns_of_roles(tmp_path):
    llama(tmp_path)
    model = load_model(tmp_path)
    assert set(attach_lora(model, Lora(targets=("mlp.*",)))) == {
        f"blocks.{i}.mlp.{part}" for i in (0, 1) for part in ("gate", "up", "down")
    }
    with pytest.raises(ConfigError, match=r"lora\.rank wants at least 1, found 0"):
        attach_lora(model, Lora(rank=0))
    with pytest.raises(ConfigError, match=r"lora.targets: 'attn.w' names no linear layer\. Did you mean 'attn\.v'"):
        attach_lora(model, Lora(targets=("attn.w",)))


def test_disabled_is_the_base_and_puts_the_adapter_back(tmp_path):
    llama(tmp_path)
    model = load_model(tmp_path)
    base = logits(model)
    attach_lora(model, Lora(rank=3))
    randomize(model)
    adapted = logits(model)
    with disabled(model):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), adapted)
    assert not torch.equal(adapted, base)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda config, tensors: config.update(use_dora=True), "use_dora is True, which lumen does not read"),
        (lambda config, tensors: config.update(modules_to_save=["lm_head"]), "modules_to_save"),
        (lambda config, tensors: config.update(init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
        (lambda config, tensors: config.update(alpha_pattern={"[": 3}), "'[' is no regular expression"),
        (lambda config, tensors: config.update(peft_type="LOHA"), "peft_type wants 'LORA', found 'LOHA'"),
        (lambda config, tensors: config.update(lora_alpha=None), "lora_alpha wants a number"),
        (lambda config, tensors: tensors.pop(next(iter(tensors))), "both A and B are wanted"),
        (lambda config, tensors: tensors.clear(), "holds no LoRA tensors"),
        (
            lambda config, tensors: tensors.update({"model.lm_head.lora_A.weight": torch.ones(2)}),
            "has no place in this model",
        ),
        (
            lambda config, tensors: tensors.update({key: torch.ones(3, 5) for key in tensors}),
            "Was the adapter trained on this base model?",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(tmp_path, edit, words):
    llama(tmp_path / "base")
    model = load_model(tmp_path / "base")
    attach_lora(model, Lora(rank=2))
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_adapter(model, folder, Lora(rank=2), "base")
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    edit(config, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError) as refused:
        load_adapter(load_model(tmp_path / "base"), folder)
    assert words in str(refused.value)


def test_a_folder_without_an_adapter_says_what_one_holds(tmp_path):
    llama(tmp_path)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json and adapter_model\.safetensors"):
        load_adapter(load_model(tmp_path), tmp_path)
