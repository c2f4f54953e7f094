"""Adapters against PEFT: what each writes, the other reads, with equal logits."""

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import byte_level_tokenizer, family, llama, relative_error

from lumen.adapter import attach_lora, disabled, load_adapter, save_adapter
from lumen.checkpoint import load_model
from lumen.config import Lora, load_config, write_toml
from lumen.data.batch import Batch
from lumen.errors import CheckpointError, ConfigError, ExportError
from lumen.export.__main__ import main as export
from lumen.export.merge import merge
from lumen.nn.linear import LoraPair
from lumen.objectives.sft import sft_loss
from lumen.ops.dropout import draw_seeds, kept
from lumen.ops.nf4 import dequantize_nf4, quantize_nf4
from lumen.optim import AdamW
from lumen.run import Run
from lumen.source import find_source
from lumen.train import finetune, prepare

TOKENS = torch.randint(257, (2, 20), generator=torch.Generator().manual_seed(5))
POSITIONS = torch.arange(20).expand(2, 20)
Q = "base_model.model.model.layers.0.self_attn.q_proj"


def logits(model):
    return model.logits(model(TOKENS, POSITIONS))


def randomize(model):
    """Moves all that learns: B starts at zero, magnitudes and whole matrices at the base, which would hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def saved(model, lora, folder):
    """`folder`, with the adapter of `model` in it."""
    folder.mkdir()
    save_adapter(model, folder, lora, "base")
    return folder


LORAS = {
    "lora": Lora(rank=4, alpha=8.0),
    "rslora": Lora(rank=4, alpha=8.0, rslora=True),
    "two roles": Lora(rank=2, targets=("attn.q", "mlp.down")),
    "dora": Lora(rank=4, alpha=8.0, dora=True),
    "dora, rslora": Lora(rank=4, alpha=8.0, dora=True, rslora=True),
    "patterns": Lora(rank=4, alpha=8.0, rank_pattern={"[qk]_proj": 2}, alpha_pattern={"layers.1.mlp.up_proj": 3.0}),
    "embed": Lora(rank=4, modules_to_save=("embed",)),
    "head": Lora(rank=4, modules_to_save=("head",)),
    "both": Lora(rank=4, modules_to_save=("embed", "head"), dora=True),
}


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
@pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS)
def test_peft_loads_what_lumen_saves_with_equal_logits(tmp_path, lora, tied):
    llama(tmp_path / "base", tie_word_embeddings=tied)
    model = load_model(tmp_path / "base")
    attach_lora(model, lora)
    randomize(model)
    folder = saved(model, lora, tmp_path / "adapter")
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, folder).eval()
    assert relative_error(logits(model), theirs(TOKENS).logits) < 1e-5
    again = load_model(tmp_path / "base")
    settings = load_adapter(again, folder)
    assert torch.equal(logits(again), logits(model))
    assert again.spec.tied == tied
    second = saved(again, settings, tmp_path / "again")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (second / name).read_bytes() == (folder / name).read_bytes()


PEFTS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 3}},
    "regular expressions": {"alpha_pattern": {r"layers\.0\.self_attn\.[qk]_proj": 64}},
    "the first key counts": {"rank_pattern": {"[a-z]*_proj": 3, "q_proj": 2}, "alpha_pattern": {"^q_proj": 5}},
    "targets as a list": {"target_modules": ["q_proj", "layers.1.mlp.up_proj", "model.layers.0.mlp.down_proj"]},
    "targets as an expression": {"target_modules": r".*\.1\..*(q|v|down)_proj"},
    "dora": {"use_dora": True},
    "dora, rslora": {"use_dora": True, "use_rslora": True, "rank_pattern": {"v_proj": 2}},
    "embed": {"modules_to_save": ["embed_tokens"]},
    "head": {"modules_to_save": ["lm_head"]},
    "both": {"modules_to_save": ["embed_tokens", "lm_head"], "use_dora": True},
    "kept tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "gaussian": {"init_lora_weights": "gaussian"},
}


@pytest.mark.filterwarnings("ignore")  # PEFT's, about tied matrices that learn apart: that is what is looked at
@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
@pytest.mark.parametrize("settings", PEFTS.values(), ids=PEFTS)
def test_lumen_loads_what_peft_saves_with_equal_logits(tmp_path, settings, tied):
    base = llama(tmp_path / "base", tie_word_embeddings=tied)
    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False}
    theirs = peft.get_peft_model(base, peft.LoraConfig(**config | settings)).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    model = load_model(tmp_path / "base")
    load_adapter(model, tmp_path / "adapter")
    assert relative_error(logits(model), theirs(TOKENS).logits) < 1e-5
    with disabled(model), theirs.disable_adapter():
        assert relative_error(logits(model), theirs(TOKENS).logits) < 1e-5


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
def test_a_base_that_was_resized_before_training_loads_with_its_new_rows(tmp_path, tied):
    base = llama(tmp_path / "base", tie_word_embeddings=tied)
    base.config._name_or_path = base.name_or_path = str(tmp_path / "base")
    base.resize_token_embeddings(260)
    whole = {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": tied}
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"], **whole)).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    model = load_model(tmp_path / "base")
    settings = load_adapter(model, tmp_path / "adapter")
    tokens, positions = torch.tensor([[5, 257, 258, 259]]), torch.arange(4)[None]
    ours = model.logits(model(tokens, positions))
    assert ours.shape == (1, 4, 260)
    assert relative_error(ours, theirs(tokens).logits) < 1e-5
    with disabled(model):
        assert relative_error(logits(model)[..., :257], logits(load_model(tmp_path / "base"))) < 1e-6

    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    again.resize_token_embeddings(260)
    again = peft.PeftModel.from_pretrained(again, saved(model, settings, tmp_path / "again")).eval()
    assert relative_error(ours, again(tokens).logits) < 1e-5


def steps_of_both(theirs, model, embedding_lr=0.0, lr=3e-3, steps=5):
    """Losses of a few steps, those of PEFT's model under torch's AdamW and ours under lumen's: (2, steps)."""
    groups = [{"params": [], "lr": lr}, {"params": [], "lr": embedding_lr or lr}]
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            groups["modules_to_save" in name]["params"].append(parameter)
    reference = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
    ours = AdamW(
        model.named_parameters(),
        beta1=0.9,
        beta2=0.999,
        eps=1e-8,
        weight_decay=0.0,
        rates={f"{role}.weight": (embedding_lr or lr) / lr for role in ("embed", "head")},
    )
    losses = [[], []]
    for step in range(steps):
        tokens = torch.randint(257, (2, 20), generator=torch.Generator().manual_seed(step))
        loss = theirs(tokens, labels=tokens).loss
        loss.backward()
        reference.step()
        reference.zero_grad()
        target = torch.cat([tokens[:, 1:], torch.full((2, 1), -100)], dim=1)
        found = sft_loss(
            model, Batch(tokens=tokens, target=target, position=POSITIONS, document=torch.zeros_like(tokens))
        )
        (found.total / found.count).backward()
        ours.step(lr)
        ours.zero_grad()
        losses[0].append(loss.item())
        losses[1].append((found.total / found.count).item())
    return torch.tensor(losses)


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
@pytest.mark.parametrize(
    ("settings", "embedding_lr"),
    [
        ({}, 0.0),
        ({"use_rslora": True}, 0.0),
        ({"use_dora": True}, 0.0),
        ({"use_dora": True, "modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}, 0.0),
        ({"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}, 1e-3),
    ],
    ids=["lora", "rslora", "dora", "dora, both", "both, slower"],
)
def test_five_steps_of_training_and_the_merge_are_those_of_peft(tmp_path, settings, embedding_lr, tied):
    base = llama(tmp_path / "base", tie_word_embeddings=tied)
    base.config._name_or_path = str(tmp_path / "base")
    # the targets are named in full, since PEFT itself counts the head of a tied model among all linear layers
    layers = [f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")]
    config = {"r": 4, "lora_alpha": 8, "target_modules": layers, "task_type": "CAUSAL_LM"}
    theirs = peft.get_peft_model(base, peft.LoraConfig(**config | settings)).train()
    theirs.save_pretrained(tmp_path / "start")
    model = load_model(tmp_path / "base")
    lora = load_adapter(model, tmp_path / "start")
    wanted, found = steps_of_both(theirs, model.train(), embedding_lr)
    assert (wanted - found).abs().max() <= 1e-5
    assert wanted[0] > wanted[-1]

    theirs.save_pretrained(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    save_adapter(model, tmp_path / "ours", lora, str(tmp_path / "base"))
    ours, reference = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("ours", "theirs"))
    assert ours.keys() == reference.keys()
    for key, values in reference.items():
        torch.testing.assert_close(ours[key], values, rtol=1e-3, atol=1e-5)

    byte_level_tokenizer(tmp_path / "base")
    merge(tmp_path / "ours", tmp_path / "merged")
    merged = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    assert relative_error(merged(TOKENS).logits, logits(model.eval())) <= 1e-5
    assert relative_error(merged(TOKENS).logits, theirs.merge_and_unload()(TOKENS).logits) <= 1e-4  # of 5 steps apart


def test_dora_beside_a_4_bit_base_is_dora_beside_what_its_codes_stand_for(tmp_path):
    base = llama(tmp_path / "base")
    model = load_model(tmp_path / "base", nf4=True)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if name.endswith("_proj.weight"):
                parameter.copy_(dequantize_nf4(quantize_nf4(parameter.detach())))
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "use_dora": True}
    theirs = peft.get_peft_model(base, peft.LoraConfig(**settings)).train()
    theirs.save_pretrained(tmp_path / "start")
    fresh = load_model(tmp_path / "base", nf4=True)
    before = logits(fresh)
    attach_lora(fresh, Lora(dora=True))
    assert torch.equal(logits(fresh), before)
    load_adapter(model, tmp_path / "start")
    wanted, found = steps_of_both(theirs, model.train())
    assert (wanted - found).abs().max() <= 1e-5
    model.eval(), theirs.eval()
    assert relative_error(logits(model), theirs(TOKENS).logits) <= 1e-5


def test_dropout_thins_all_that_dora_adds(tmp_path):
    llama(tmp_path)
    layer = load_model(tmp_path).blocks[0].attn.q
    layer.lora = LoraPair(64, 64, 4, 2.0, 0.5, torch.device("cpu"))
    layer.lora.decompose(layer.weight)
    torch.nn.init.normal_(layer.lora.b)
    torch.nn.init.normal_(layer.lora.magnitude)
    x = torch.randn(7, 64)
    torch.manual_seed(1)
    thin = torch.where(kept(7, 64, 0.5, draw_seeds(1, x.device)[0]), 2 * x, 0)
    pair = layer.lora
    turned = layer.weight + 2.0 * pair.b @ pair.a
    ratio = pair.magnitude / turned.norm(dim=1)
    wanted = x @ layer.weight.T + (ratio - 1) * (thin @ layer.weight.T) + ratio * 2.0 * (thin @ pair.a.T @ pair.b.T)
    torch.manual_seed(1)
    assert relative_error(layer.train()(x), wanted) < 1e-6
    assert relative_error(layer.eval()(x), x @ (ratio[:, None] * turned).T) < 1e-6


def test_first_values_are_those_that_the_settings_ask_for(tmp_path):
    llama(tmp_path, hidden_size=256, intermediate_size=512)
    model = load_model(tmp_path)
    for init, spread in (("gaussian", 1 / 8), ("default", 1 / 3**0.5 / 256**0.5)):
        torch.manual_seed(0)
        pairs = attach_lora(model, Lora(rank=8, init=init, targets=("attn.q",)))
        for pair in pairs.values():
            assert pair.a.std().item() == pytest.approx(spread, rel=0.1)
            assert not pair.b.any()


def test_a_pattern_that_fits_no_layer_is_refused(tmp_path):
    llama(tmp_path)
    with pytest.raises(ConfigError, match=r"lora.rank_pattern: 'q_prj' fits no adapted layer. Did you mean 'q_proj'"):
        attach_lora(load_model(tmp_path), Lora(rank_pattern={"q_prj": 3}))
    with pytest.raises(ConfigError, match=r"lora.alpha_pattern: '\[' is no regular expression"):
        attach_lora(load_model(tmp_path), Lora(alpha_pattern={"[": 3.0}))


def test_targets_that_a_word_would_widen_are_named_in_full(tmp_path):
    llama(tmp_path / "base")
    model = load_model(tmp_path / "base")
    attach_lora(model, Lora(targets=("attn.q", "mlp.up")))
    model.blocks[1].attn.q.lora = None
    folder = saved(model, Lora(), tmp_path / "adapter")
    wanted = ["model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    assert json.loads((folder / "adapter_config.json").read_text())["target_modules"] == wanted


MERGES = ("rslora", "patterns", "dora, rslora", "embed", "head", "both", "kept tied")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
@pytest.mark.parametrize("settings", [PEFTS[name] for name in MERGES], ids=MERGES)
def test_the_merged_folder_is_what_peft_merges(tmp_path, settings, tied):
    base = llama(tmp_path / "base", tie_word_embeddings=tied)
    byte_level_tokenizer(tmp_path / "base")
    layers = [f"{part}_proj" for part in ("q", "v", "o", "gate", "down")]
    config = {"r": 4, "lora_alpha": 8, "target_modules": layers, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    theirs = peft.get_peft_model(base, peft.LoraConfig(**config | settings)).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    name_base(tmp_path / "adapter", "../base")
    merged = merge(tmp_path / "adapter", tmp_path / "merged")
    ours = transformers.LlamaForCausalLM.from_pretrained(merged)
    assert relative_error(ours(TOKENS).logits, theirs.merge_and_unload()(TOKENS).logits) <= 1e-5
    assert relative_error(logits(load_model(merged)), ours(TOKENS).logits) <= 1e-5


def name_base(folder, base):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))


@pytest.mark.filterwarnings("ignore")
def test_a_family_whose_head_is_always_tied_is_not_merged_apart(tmp_path):
    base = family(tmp_path / "base", "gemma")
    byte_level_tokenizer(tmp_path / "base")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    theirs = peft.get_peft_model(base, config).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    name_base(tmp_path / "adapter", tmp_path / "base")
    model, _ = find_source(str(tmp_path / "adapter")).load()
    assert relative_error(logits(model), theirs(TOKENS).logits) <= 1e-5
    with pytest.raises(ExportError, match="gemma: this family has one matrix for embedding and head"):
        merge(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


# Training that goes on from an adapter


@pytest.fixture
def trained(tmp_path):
    """An adapter that PEFT saved beside its base, data, and what a run file says of them: (folder, logits, run)."""
    base = llama(tmp_path / "base", vocab_size=290)
    byte_level_tokenizer(tmp_path / "base")
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "lora_dropout": 0.1, "use_dora": True}
    theirs = peft.get_peft_model(base, peft.LoraConfig(**config, rank_pattern={"up_proj": 2})).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    name_base(tmp_path / "adapter", "../base")
    (tmp_path / "texts.jsonl").write_text('{"text": "the quick brown fox jumps over the lazy dog"}\n' * 4)

    def run(*overrides):
        told = [f"data.train={tmp_path}/texts.jsonl", "data.max_length=64", "data.too_long=truncate", "train.steps=2"]
        told += ["model.nf4=false", f"output.folder={tmp_path}/run", "train.lr=1e-3", "train.warmup_fraction=0.0"]
        (tmp_path / "run.toml").write_text("")
        return load_config(tmp_path / "run.toml", [*told, *overrides])

    return tmp_path, theirs(TOKENS).logits.detach(), run


@pytest.mark.parametrize("by", ["lora.adapter", "model.path"])
def test_a_run_goes_on_from_an_adapter_and_saves_one_of_its_kind(trained, by):
    folder, wanted, run = trained
    told = [f"model.path={folder}/adapter"]
    if by == "lora.adapter":
        told = [f"model.path={folder}/base", f"lora.adapter={folder}/adapter", "lora.rank=4"]
    begun = prepare(run(*told), Run.create(folder / "run", run(*told)), None)
    assert relative_error(logits(begun.model.eval()), wanted) < 1e-5
    assert begun.model.blocks[0].attn.q.lora.dropout == 0.0  # the run's, not the adapter's
    begun.run.discard()
    finetune(run(*told))
    model, _ = find_source(str(folder / "run")).load()
    assert 1e-6 < relative_error(logits(model), wanted) < 0.5
    saved = json.loads((folder / "run/adapter/adapter_config.json").read_text())
    kept = {"r": 4, "lora_alpha": 8, "use_dora": True, "rank_pattern": {"up_proj": 2}, "lora_dropout": 0.0}
    assert {key: saved[key] for key in kept} == kept
    assert Path(saved["base_model_name_or_path"]) == folder / "base"
    theirs = transformers.LlamaForCausalLM.from_pretrained(saved["base_model_name_or_path"])
    theirs = peft.PeftModel.from_pretrained(theirs, folder / "run/adapter").eval()
    assert relative_error(logits(model), theirs(TOKENS).logits) < 1e-5


def test_more_matrices_may_learn_when_a_run_goes_on(trained):
    folder, wanted, run = trained
    told = run(f"model.path={folder}/adapter", "lora.modules_to_save=head", "train.embedding_lr=1e-4")
    begun = prepare(told, Run.create(folder / "run", told), None)
    assert relative_error(logits(begun.model.eval()), wanted) < 1e-5
    learning = {name for name, parameter in begun.model.named_parameters() if parameter.requires_grad}
    assert {name for name in learning if ".lora." not in name} == {"head.weight"}
    assert begun.optimizer.rates["head.weight"] == pytest.approx(0.1)


def test_a_run_file_says_all_of_it_and_repeats_it(trained):
    folder, _, run = trained
    told = run("model.path=lumen-demo", "lora.rank_pattern={ q_proj = 8 }", 'lora.modules_to_save="head"')
    assert (told.lora.rank_pattern, told.lora.modules_to_save) == ({"q_proj": 8}, ("head",))
    (folder / "again.toml").write_text(write_toml(told))
    assert load_config(folder / "again.toml") == told
    for wrong, words in (
        ("lora.init=pissa", "must be one of default, gaussian"),
        ('lora.modules_to_save=["norm"]', "lora.modules_to_save"),
        ("lora.rank_pattern={ q_proj = 0 }", "lora.rank_pattern"),
    ):
        with pytest.raises(ConfigError, match=words):
            run("model.path=lumen-demo", wrong)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.path={}/adapter", "lora.rank=8"], "lora.rank=8: the adapter {}/adapter is trained further as it is"),
        (["model.path={}/adapter", "lora.targets=attn.q"], "Leave lora.targets out"),
        (["model.path={}/adapter", "lora.adapter={}/adapter"], "is an adapter already"),
        (["model.path={}/adapter", "train.method=full"], "train.method=full wants a whole model"),
    ],
)
def test_a_run_that_contradicts_its_adapter_is_refused(trained, overrides, words):
    folder, _, run = trained
    with pytest.raises(ConfigError) as refused:
        finetune(run(*(text.format(folder) for text in overrides)))
    assert words.format(folder) in str(refused.value)
    assert not (folder / "run").exists()


def test_the_base_of_an_adapter_is_looked_for_beside_it_and_then_in_the_working_directory(trained, monkeypatch):
    folder, wanted, _ = trained
    model, tokenizer = find_source(str(folder / "adapter")).load()
    assert relative_error(logits(model), wanted) < 1e-5
    assert tokenizer.size == 290
    name_base(folder / "adapter", "base")
    monkeypatch.chdir(folder)
    assert find_source("adapter").base == Path("base")
    name_base(folder / "adapter", "elsewhere")
    with pytest.raises(CheckpointError, match="base_model_name_or_path is 'elsewhere', where there is no model"):
        find_source("adapter")


def test_an_exported_adapter_finds_its_base_from_its_new_place(trained, monkeypatch):
    folder, wanted, _ = trained
    for number, (named, place) in enumerate([("../base", folder / "elsewhere"), ("base", folder)]):
        name_base(folder / "adapter", named)
        place.mkdir(exist_ok=True)
        monkeypatch.chdir(place)  # of the second the base lies in the working directory
        (folder / "far").mkdir(exist_ok=True)
        out = folder / f"far/{number}"
        assert export([str(folder / "adapter"), str(out), "--as", "adapter"]) == 0
        monkeypatch.chdir(out)
        model, _ = find_source(str(out)).load()
        assert relative_error(logits(model), wanted) < 1e-5


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


@pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
def test_a_fresh_dora_changes_nothing_in_bf16_either_and_magnitudes_and_matrices_learn(tmp_path, nf4):
    llama(tmp_path)
    model = load_model(tmp_path, dtype="bfloat16", nf4=nf4)
    before = logits(model)
    pairs = attach_lora(model, Lora(rank=3, dora=True, modules_to_save=("embed", "head")))
    assert torch.equal(logits(model), before)
    learning = {name: parameter.dtype for name, parameter in model.named_parameters() if parameter.requires_grad}
    parts = [f"{role}.lora.{part}" for role in pairs for part in ("a", "b", "magnitude")]
    assert learning == dict.fromkeys(["embed.weight", "head.weight", *parts], torch.float32)


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
        (lambda config, tensors: config.update(use_dora=True), "lora_magnitude_vector is missing"),
        (lambda config, tensors: config.update(bias="all"), "bias is 'all', which lumen does not read. Biases that"),
        (lambda config, tensors: config.update(modules_to_save=["lm_head"]), "'lm_head', of which there is no weight"),
        (lambda config, tensors: config.update(target_modules=["q_proj"]), "which target_modules in"),
        (lambda config, tensors: config.update(rank_pattern={"q_proj": 3}), "has 2 rows, but adapter_config.json says"),
        (lambda config, tensors: config.update(alpha_pattern={"q_proj": "x"}), "alpha_pattern wants an object of numb"),
        (lambda config, tensors: config.update(init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
        (lambda config, tensors: config.update(alpha_pattern={"[": 3}), "'[' is no regular expression"),
        (lambda config, tensors: config.update(peft_type="LOHA"), "peft_type wants 'LORA', found 'LOHA'"),
        (lambda config, tensors: config.update(lora_alpha=None), "lora_alpha wants a number"),
        (lambda config, tensors: tensors.pop(next(iter(tensors))), "both A and B are wanted"),
        (lambda config, tensors: tensors.clear(), "holds no LoRA tensors"),
        (
            lambda config, tensors: tensors.update({f"{Q}.lora_magnitude_vector": torch.ones(64)}),
            "has lora_magnitude_vector, but use_dora is not set",
        ),
        (
            lambda config, tensors: tensors.update({"base_model.model.lm_head.weight": torch.ones(260, 64)}),
            "embedding and head have 257 and 260 rows",
        ),
        (
            lambda config, tensors: tensors.update({"base_model.model.lm_head.weight": torch.ones(257, 32)}),
            "wants shape (V, 64), found (257, 32)",
        ),
        (
            lambda config, tensors: tensors.update({"base_model.model.model.norm.weight": torch.ones(64)}),
            "has no place in this model",
        ),
        (
            lambda config, tensors: tensors.update({"model.lm_head.lora_A.weight": torch.ones(2)}),
            "has no place in this model",
        ),
        (
            lambda config, tensors: tensors.update({key: torch.ones(2, 5) for key in tensors}),
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
