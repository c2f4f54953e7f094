"""The pages with experts, beyond what is proven of every page: pairs of experts, packing, merging, layers without."""

import copy
import json
from pathlib import Path

import gguf
import peft
import pytest
import torch
import transformers
from llama_cpp import LlamaCpp
from proofs import TOLERANCE
from safetensors.torch import load_file, save_file
from test_families import LENGTH, become_its_gradients, logits_of, some_tokens, weights
from tiny_models import byte_level_tokenizer, family, relative_error
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from lumen.adapter import attach_lora, load_adapter, lora_pairs, save_adapter
from lumen.checkpoint import linear_layers, load_model, save_model
from lumen.config import Lora
from lumen.errors import CheckpointError, ConfigError, ExportError, SpecError
from lumen.export.gguf import write_gguf
from lumen.export.merge import merge
from lumen.models.decoder import Decoder
from lumen.nn.experts import ExpertLoraPairs
from lumen.ops import linear_cross_entropy
from lumen.optim import AdamW
from lumen.sampling import generate
from lumen.spec import load_family

SHAPES = ("mixtral", "qwen2-moe", "qwen3-moe")
CLEARLY = 0.05  # relative: what a wrong file must at least do to the logits
LORA = Lora(rank=4, alpha=8.0)
STEPS, LR = 5, 5e-3
EPS = (
    1e-4  # of AdamW: with a small one it takes the sign of gradients that are nothing but rounding, as of rare experts
)
ROUNDING = 1e-7  # absolute: of a gradient that is zero but for it, where others are 1e-3
VARIATIONS = {  # what is special → a shape and what it sets
    "one expert a token": ("qwen3-moe", {"num_experts_per_tok": 1}),
    "one expert a token, not normalized": ("qwen2-moe", {"num_experts_per_tok": 1}),
    "one large expert a token": ("mixtral", {"num_experts_per_tok": 1}),
    "all experts": ("mixtral", {"num_experts_per_tok": 4}),
    "normalized beside a shared one": ("qwen2-moe", {"norm_topk_prob": True}),
    "not normalized": ("qwen3-moe", {"norm_topk_prob": False}),
    "a layer without experts": ("qwen2-moe", {"mlp_only_layers": [1]}),
    "every second layer": ("qwen3-moe", {"decoder_sparse_step": 2}),
    "every layer but one, by both words": ("qwen3-moe", {"decoder_sparse_step": 1, "mlp_only_layers": [0]}),
    "tied": ("qwen3-moe", {"tie_word_embeddings": True}),
    "many experts, few tokens for each": ("qwen3-moe", {"num_experts": 40, "num_experts_per_tok": 2}),
}


@pytest.fixture(params=VARIATIONS)
def variation(request, tmp_path) -> tuple[Path, transformers.PreTrainedModel]:
    shape, changes = VARIATIONS[request.param]
    return tmp_path, family(tmp_path, shape, **changes)


def adapted(folder: Path, out: Path | None = None) -> Decoder:
    """The model with pairs on everything, whose B are not zero; saved in the new folder `out`."""
    model = load_model(folder)
    torch.manual_seed(0)
    for pair in attach_lora(model, LORA).values():
        torch.nn.init.normal_(pair.b, 0, 0.1)
    if out is not None:
        out.mkdir()
        save_adapter(model, out, LORA, str(folder))
    return model


# --- layers and sizes -------------------------------------------------------------------------------------------------


def test_logits_gradients_and_files_equal_those_of_transformers(variation, tmp_path):
    folder, theirs = variation
    ours = load_model(folder).requires_grad_(True)
    tokens = some_tokens(2, 24)
    wanted, found = theirs(tokens).logits, logits_of(ours, tokens)
    assert relative_error(found, wanted) <= TOLERANCE
    for logits in (wanted, found):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for name in ("saved", "ours", "theirs"):
        (tmp_path / name).mkdir()
    save_model(ours, tmp_path / "saved")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "saved/model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    become_its_gradients(theirs).save_pretrained(tmp_path / "theirs")
    save_model(become_its_gradients(ours), tmp_path / "ours")
    wanted, found = weights(tmp_path / "theirs"), weights(tmp_path / "ours")
    assert wanted.keys() == found.keys()
    own = ours.spec.experts
    always_one = {name.checkpoint for name in ours.spec.tensors() if name.role.endswith("router.weight")}
    for name in wanted:
        if own.per_token == 1 and own.normalize and name in always_one:  # a weight that is 1 whatever the scores say
            assert max(found[name].abs().max(), wanted[name].abs().max()) <= ROUNDING, name
        else:
            assert relative_error(found[name], wanted[name]) <= TOLERANCE, name


@pytest.mark.parametrize("what", ["one expert a token", "a layer without experts"])
def test_answers_equal_those_of_transformers(tmp_path, what):
    shape, changes = VARIATIONS[what]
    folder, theirs = tmp_path, family(tmp_path, shape, **changes)
    prompts = [some_tokens(1, length, length)[0].tolist() for length in (3, 17)]
    for prompt, answer in zip(prompts, generate(load_model(folder), prompts, max_tokens=12, stop_ids=()), strict=True):
        options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        assert prompt + answer.ids == theirs.generate(torch.tensor([prompt]), **options)[0].tolist()


def test_tokens_that_all_go_to_one_expert_have_the_logits_and_gradients_of_transformers(tmp_path):
    theirs = family(tmp_path, "mixtral", num_experts_per_tok=1)
    ours = load_model(tmp_path).requires_grad_(True)
    tokens = torch.full((1, 9), 7)
    wanted, found = theirs(tokens).logits, logits_of(ours, tokens)
    assert relative_error(found, wanted) <= TOLERANCE
    wanted.square().mean().backward()
    found.square().mean().backward()
    layer = ours.blocks[0].mlp.experts.down
    used = [bool(gradient.any()) for gradient in layer.weight.grad]
    assert sum(used) == 1  # the same token without a past has the same experts everywhere
    their_layer = theirs.model.layers[0].mlp.experts
    assert relative_error(layer.weight.grad, their_layer.down_proj.grad) <= TOLERANCE
    both = torch.cat([ours.blocks[0].mlp.experts.gate.weight.grad, ours.blocks[0].mlp.experts.up.weight.grad], dim=1)
    assert relative_error(both, their_layer.gate_up_proj.grad) <= TOLERANCE


@pytest.mark.parametrize(
    ("shape", "changes", "words"),
    [
        ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok wants a number of experts from 1 to the 4"),
        ("mixtral", {"sliding_window": 8}, "sliding_window is 8; family 'mixtral' wants 'absent'"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1"),
        ("mixtral", {"num_local_experts": None}, "wants 'num_local_experts', found neither"),
        ("qwen2-moe", {"norm_topk_prob": None}, "norm_topk_prob wants true or false, found None"),
        ("qwen2-moe", {"mlp_only_layers": [3]}, "mlp_only_layers wants a list of layers from 0 to 2, found [3]"),
        ("qwen2-moe", {"decoder_sparse_step": 0}, "wants a step of at least 1 layer, found 0"),
        ("qwen2-moe", {"moe_intermediate_size": 0}, "experts want a positive width, found 0"),
        ("qwen2-moe", {"use_sliding_window": True}, "use_sliding_window is True"),
        ("qwen2-moe", {"tie_word_embeddings": True}, "tie_word_embeddings is True"),
    ],
)
def test_a_config_that_no_layer_of_experts_can_have_is_refused(tmp_path, shape, changes, words):
    family(tmp_path, shape)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(SpecError) as refused:
        load_family(tmp_path)
    assert words in str(refused.value)


def test_a_checkpoint_that_lacks_one_expert_is_refused_by_its_name(tmp_path):
    family(tmp_path, "qwen3-moe")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.4.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.experts\.4\.up_proj\.weight"):
        load_model(tmp_path)


# --- pairs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_and_experts_are_adapted_and_never_the_router(tiny, shape):
    model = load_model(tiny(shape).folder)
    pairs = attach_lora(model, LORA)
    assert pairs.keys() == linear_layers(model).keys()
    assert {role for role in pairs if "router" in role or "shared_gate" in role} == set()
    assert isinstance(pairs["blocks.0.mlp.experts.gate"], ExpertLoraPairs)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == {f"{role}.lora.{half}" for role in pairs for half in "ab"}
    for word in ("mlp.router", "mlp.shared_gate", "mlp.gate"):
        with pytest.raises(ConfigError, match=f"{word!r} names no linear layer"):
            attach_lora(model, Lora(targets=(word,)))
    with pytest.raises(ConfigError, match=r"'blocks\.0\.mlp\.experts\.gate' is a stack of experts"):
        attach_lora(load_model(tiny(shape).folder), Lora(dora=True, targets=("mlp.experts.*",)))


@pytest.mark.parametrize("shape", SHAPES)
def test_an_adapter_has_a_pair_of_keys_for_every_expert_and_loads_back_to_the_bit(tiny, shape, tmp_path):
    model = adapted(tiny(shape).folder, tmp_path / "adapter")
    keys = load_file(tmp_path / "adapter/adapter_model.safetensors")
    pair = lora_pairs(model)["blocks.1.mlp.experts.up"]
    module = model.spec.names.by_role("blocks.1.mlp.experts.up").modules[3]
    assert module.endswith((".mlp.experts.3.up_proj", ".block_sparse_moe.experts.3.w3"))
    assert torch.equal(keys[f"base_model.model.{module}.lora_A.weight"], pair.a[3])
    assert torch.equal(keys[f"base_model.model.{module}.lora_B.weight"], pair.b[3])
    again = load_model(tiny(shape).folder)
    load_adapter(again, tmp_path / "adapter")
    for role, pair in lora_pairs(model).items():
        other = lora_pairs(again)[role]
        assert torch.equal(pair.a, other.a) and torch.equal(pair.b, other.b) and pair.scale == other.scale


# PEFT 0.21 knows how the per-expert keys of a checkpoint go into the stacks of transformers 5 for these two. Of
# Qwen2-MoE it reads the names and leaves the pairs of experts out: its merge, below, is held against transformers.
@pytest.mark.parametrize("shape", ["mixtral", "qwen3-moe"])
def test_peft_loads_what_lumen_saves_with_equal_logits(tiny, shape, tmp_path):
    model = adapted(tiny(shape).folder, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(tiny(shape).theirs), tmp_path / "adapter").eval()
    tokens = some_tokens(2, LENGTH)
    with torch.no_grad():
        assert relative_error(logits_of(model, tokens), theirs(tokens).logits) <= TOLERANCE
        assert relative_error(logits_of(model, tokens), tiny(shape).theirs(tokens).logits) >= CLEARLY


def updated(model: Decoder, theirs: transformers.PreTrainedModel, pairs: dict[str, tuple[Tensor, Tensor]]) -> dict:
    """transformers' weights plus scale · B A, as functions of the A and B in `pairs`."""
    state = dict(theirs.named_parameters())
    update = {role: LORA.alpha / LORA.rank * (b @ a) for role, (a, b) in pairs.items()}
    for block in range(len(model.blocks)):
        experts = f"blocks.{block}.mlp.experts"
        inner = torch.cat([update.pop(f"{experts}.gate"), update.pop(f"{experts}.up")], dim=1)
        for name, value in {"gate_up_proj": inner, "down_proj": update.pop(f"{experts}.down")}.items():
            key = f"model.layers.{block}.mlp.experts.{name}"
            state[key] = state[key].detach() + value
    for role, value in update.items():
        key = f"{model.spec.names.by_role(role).checkpoint}.weight"
        state[key] = state[key].detach() + value
    return state


@pytest.mark.parametrize("shape", SHAPES)
def test_five_steps_of_lora_equal_autograd_through_the_updated_weights_of_transformers(tiny, shape):
    ours, theirs = load_model(tiny(shape).folder), tiny(shape).theirs
    torch.manual_seed(3)
    pairs = attach_lora(ours, LORA)
    copies = {role: (pair.a.detach().clone(), pair.b.detach().clone()) for role, pair in pairs.items()}
    learning = [half.requires_grad_() for both in copies.values() for half in both]
    settings = {"eps": EPS, "weight_decay": 0.01}
    their_optimizer = torch.optim.AdamW(learning, lr=LR, **settings)
    our_optimizer = AdamW(ours.named_parameters(), beta1=0.9, beta2=0.999, **settings)
    tokens = torch.randint(2, 320, (STEPS, 2, 24), generator=torch.Generator().manual_seed(4))
    for batch in tokens:
        target = F.pad(batch[:, 1:], (0, 1), value=-100).flatten()
        logits = functional_call(theirs, updated(ours, theirs, copies), (batch,)).logits
        wanted = F.cross_entropy(logits.flatten(0, 1), target)
        hidden = ours(batch, torch.arange(24).expand(2, 24)).flatten(0, 1)
        total, count = linear_cross_entropy(hidden, ours.head_weight, target)
        assert abs(total / count - wanted) <= TOLERANCE * wanted
        their_optimizer.zero_grad()
        our_optimizer.zero_grad()
        wanted.backward()
        (total / count).backward()
        their_optimizer.step()
        our_optimizer.step(LR)
    for role, pair in pairs.items():
        assert relative_error(pair.a, copies[role][0]) <= TOLERANCE, role
        assert relative_error(pair.b, copies[role][1]) <= TOLERANCE, role


def test_an_adapter_that_lacks_an_expert_or_adapts_a_router_is_refused(tmp_path):
    family(tmp_path, "qwen3-moe")
    adapted(tmp_path, tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    whole = load_file(file)
    expert = "base_model.model.model.layers.1.mlp.experts.4.up_proj"
    save_file({key: value for key, value in whole.items() if not key.startswith(expert)}, file)
    with pytest.raises(CheckpointError, match=r"each of the 6 experts of 'blocks\.1\.mlp\.experts\.up', found none"):
        load_adapter(load_model(tmp_path), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    router = "base_model.model.model.layers.1.mlp.gate"
    save_file(
        whole | {f"{router}.lora_A.weight": torch.zeros(4, 64), f"{router}.lora_B.weight": torch.zeros(6, 4)}, file
    )
    config["target_modules"].append("gate")
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"'blocks\.1\.mlp\.router', which is no linear layer"):
        load_adapter(load_model(tmp_path), tmp_path / "adapter")


def test_experts_of_one_layer_have_one_alpha(tmp_path):
    family(tmp_path, "qwen3-moe")
    adapted(tmp_path, tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"alpha_pattern": {r"experts\.\d+\.up_proj": 16}}))
    model = load_model(tmp_path)
    load_adapter(model, tmp_path / "adapter")
    scales = {role.rpartition(".")[2]: pair.scale for role, pair in lora_pairs(model).items()}
    assert (scales["up"], scales["gate"]) == (4.0, 2.0)
    file.write_text(json.dumps(config | {"alpha_pattern": {r"experts\.3\.up_proj": 16}}))
    with pytest.raises(CheckpointError, match="are experts of one layer and want one value"):
        load_adapter(load_model(tmp_path), tmp_path / "adapter")
    with pytest.raises(ConfigError, match="are experts of one layer and want one value"):
        attach_lora(load_model(tmp_path), Lora(alpha_pattern={r"experts\.3\.up_proj": 16}))


# --- merging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_the_merged_folder_has_the_logits_of_the_adapter_in_transformers(tiny, shape, tmp_path):
    folder = tiny(shape).folder
    model = adapted(folder, tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged")
    theirs = type(tiny(shape).theirs).from_pretrained(tmp_path / "merged", dtype=torch.float32)
    tokens = some_tokens(2, LENGTH)
    with torch.no_grad():
        assert relative_error(logits_of(model, tokens), theirs(tokens).logits) <= TOLERANCE
    before, after = weights(folder), weights(tmp_path / "merged")
    assert before.keys() == after.keys()
    same = {name for name in before if torch.equal(before[name], after[name])}
    exact = {name.checkpoint for name in model.spec.tensors() if name.exact}
    assert exact and exact <= same


# --- GGUF -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_a_q8_0_file_keeps_routers_in_f32_and_stacks_the_experts(tiny, shape, tmp_path):
    write_gguf(tiny(shape).folder, tmp_path / "m.gguf", "q8_0")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    routers = {name for name in tensors if "ffn_gate_inp" in name}
    assert len(routers) == 3 * (2 if shape == "qwen2-moe" else 1)
    assert {tensors[name].tensor_type for name in routers} == {gguf.GGMLQuantizationType.F32}
    spec = load_family(tiny(shape).folder)
    own = spec.experts
    for word, wanted in (("gate", (own.count, own.width, spec.dim)), ("down", (own.count, spec.dim, own.width))):
        tensor = tensors[f"blk.2.ffn_{word}_exps.weight"]
        assert tuple(reversed(tensor.shape.tolist())) == wanted
        assert tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0


@pytest.mark.parametrize(
    ("shape", "changes", "words"),
    [
        ("qwen2-moe", {"norm_topk_prob": True}, "llama.cpp does not scale the weights of a token's experts"),
        ("qwen3-moe", {"norm_topk_prob": False}, "llama.cpp scales the weights of a token's experts"),
        ("qwen3-moe", {"mlp_only_layers": [1]}, "this one has a single MLP in layer 1"),
    ],
)
def test_what_llama_cpp_would_answer_otherwise_or_not_load_is_not_written(tmp_path, shape, changes, words):
    family(tmp_path, shape, **changes)
    byte_level_tokenizer(tmp_path)
    with pytest.raises(ExportError) as refused:
        write_gguf(tmp_path, tmp_path / "m.gguf", "f32")
    assert words in str(refused.value)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_file_with_another_number_of_experts_a_token_gives_itself_away(tiny, shape, tmp_path):
    """llama.cpp takes the number from the file: this is what the proof of every page would show of a wrong one."""
    path = tmp_path / "m.gguf"
    write_gguf(tiny(shape).folder, path, "f32")
    spec = load_family(tiny(shape).folder)
    key, data = f"{spec.gguf.arch}.expert_used_count".encode(), path.read_bytes()
    assert data.count(key) == 1
    at = data.index(key) + len(key) + 4  # the type stands between
    count = spec.experts.per_token
    assert data[at : at + 4] == count.to_bytes(4, "little")
    path.write_bytes(data[:at] + (count - 1).to_bytes(4, "little") + data[at + 4 :])
    tokens = some_tokens(1, 24)
    with LlamaCpp(path) as loaded, torch.no_grad():
        assert relative_error(loaded.logits(tokens[0].tolist()), tiny(shape).theirs(tokens).logits[0]) >= CLEARLY
