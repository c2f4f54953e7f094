"""Every page of `model_specs/`, in tiny: LoRA trained by lumen against LoRA trained by PEFT.

lumen adapts roles. Where a checkpoint keeps several in one matrix (q, k and v, or all experts), transformers has that
matrix as one layer, beside which PEFT would put one pair. So the transformers model is taken apart first, into a layer
for each role, and proven to have kept its logits.
"""

import copy

import peft
import proofs
import torch
import transformers
from proofs import TOLERANCE
from tiny_models import relative_error
from torch import Tensor, nn
from torch.nn import functional as F

from lumen.adapter import attach_lora
from lumen.checkpoint import load_model
from lumen.config import Lora
from lumen.ops import linear_cross_entropy
from lumen.optim import AdamW
from lumen.spec import ModelSpec

STEPS, LR = 5, 5e-3
ADAM = {"eps": 1e-6, "weight_decay": 0.01}
# AdamW divides a gradient by its own size: where one is no larger than the rounding of the sums it comes from, its sign
# is chance. Over twelve draws of A the ends differed by 2.5e-3 at most; a pair that did not learn would differ by 1.
ENDS_CLOSE = 5e-3


class Joined(nn.Module):
    """A linear layer as the layers that its rows belong to, one below the other."""

    def __init__(self, whole: nn.Linear, rows: dict[str, int]):
        super().__init__()
        biases = [None] * len(rows) if whole.bias is None else whole.bias.split(list(rows.values()))
        for role, weight, bias in zip(rows, whole.weight.split(list(rows.values())), biases, strict=True):
            self.add_module(role, linear(weight, bias))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.children()], dim=-1)


class Apart(nn.Module):
    """A stack of experts as three linear layers for each, computed one expert after the other."""

    def __init__(self, stack: nn.Module):
        super().__init__()
        self.act = stack.act_fn
        for expert, (gate_up, down) in enumerate(zip(stack.gate_up_proj, stack.down_proj, strict=True)):
            gate, up = gate_up.chunk(2)
            parts = {"gate": gate, "up": up, "down": down}
            self.add_module(str(expert), nn.ModuleDict({part: linear(weight) for part, weight in parts.items()}))

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for expert in range(len(self._modules) - 1):
            mlp = self.get_submodule(str(expert))
            share = (weights * (chosen == expert)).sum(-1, keepdim=True)  # (N, 1), zero where it was not chosen
            y = y + share * mlp["down"](self.act(mlp["gate"](x)) * mlp["up"](x))
        return y


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight.data = weight.detach().clone()
    if bias is not None:
        layer.bias.data = bias.detach().clone()
    return layer


def taken_apart(
    theirs: transformers.PreTrainedModel, spec: ModelSpec, outputs: dict[str, int]
) -> tuple[nn.Module, dict[str, list[str]]]:
    """A copy of `theirs` with a layer for every role, and each role's layers in it: one, or one for each expert.

    outputs  role → rows of its matrix, for all roles that are adapted
    """
    model, paths = copy.deepcopy(theirs), {}
    model.config.model_type = "taken apart"  # PEFT translates names of experts for the types that stack them
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts = Apart(layer.mlp.experts)
    for role in outputs:
        block, part = role.split(".", 2)[1:]
        path = spec.names.by_role(role).checkpoint
        together = [name.role for name in spec.names.by_checkpoint(path)]
        if part.startswith("mlp.experts."):
            stem = f"model.layers.{block}.mlp.experts"
            paths[role] = [f"{stem}.{expert}.{part.rpartition('.')[2]}" for expert in range(spec.experts.count)]
        elif len(together) > 1:
            if role == together[0]:
                rows = {other.rpartition(".")[2]: outputs[other] for other in together}
                model.set_submodule(path, Joined(model.get_submodule(path), rows))
            paths[role] = [f"{path}.{part.rpartition('.')[2]}"]
        else:
            paths[role] = [path]
    return model, paths


@proofs.of("lora")
def test_five_steps_of_lora_equal_those_of_peft(tiny, shape):
    torch.manual_seed(1)
    ours = load_model(tiny(shape).folder)
    pairs = attach_lora(ours, Lora(rank=4, alpha=8.0))
    outputs = {role: ours.get_submodule(role).outputs for role in pairs}
    theirs, paths = taken_apart(tiny(shape).theirs, ours.spec, outputs)
    batches = torch.randint(2, 320, (STEPS, 2, 24), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        assert relative_error(theirs(batches[0]).logits, tiny(shape).theirs(batches[0]).logits) <= TOLERANCE
    linears = {name for name, module in theirs.model.layers.named_modules() if isinstance(module, nn.Linear)}
    targets = [path for own in paths.values() for path in own]
    assert {f"model.layers.{name}" for name in linears if not name.endswith("shared_expert_gate")} == set(targets)

    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    adapted = {role: [theirs.get_submodule(f"base_model.model.{path}") for path in own] for role, own in paths.items()}

    def their_half(role: str, half: str) -> Tensor:
        return torch.stack([getattr(layer, half).default.weight for layer in adapted[role]])

    with torch.no_grad():
        for role, pair in pairs.items():
            pair.a.copy_(their_half(role, "lora_A").view_as(pair.a))
    learning = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    assert len(learning) == 2 * len(targets)
    their_optimizer = torch.optim.AdamW(learning, lr=LR, betas=(0.9, 0.999), **ADAM)
    our_optimizer = AdamW(ours.named_parameters(), beta1=0.9, beta2=0.999, **ADAM)
    for batch in batches:
        target = F.pad(batch[:, 1:], (0, 1), value=-100).flatten()
        wanted = F.cross_entropy(theirs(batch).logits.flatten(0, 1), target)
        hidden = ours(batch, torch.arange(24).expand(2, 24)).flatten(0, 1)
        total, count = linear_cross_entropy(hidden, ours.head_weight, target, ours.spec.logits_softcap)
        assert abs(total / count - wanted) <= TOLERANCE * wanted
        their_optimizer.zero_grad()
        our_optimizer.zero_grad()
        wanted.backward()
        (total / count).backward()
        their_optimizer.step()
        our_optimizer.step(LR)
    for role, pair in pairs.items():
        assert relative_error(pair.a, their_half(role, "lora_A").view_as(pair.a)) <= ENDS_CLOSE, role
        assert relative_error(pair.b, their_half(role, "lora_B").view_as(pair.b)) <= ENDS_CLOSE, role
