"""Adapters on a model: low-rank pairs beside its linear layers, and embedding or head learned whole.

The files are PEFT's (`peft_files.py`), so that PEFT, vLLM and others read what lumen trained, and lumen reads what PEFT
trained.
"""

import math
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from lumen.checkpoint import linear_layers
from lumen.config import Lora
from lumen.embeddings import ROLES, base_of, learn_whole, learned_whole, matrix, set_vocabulary, untie
from lumen.errors import CheckpointError, ConfigError, closest
from lumen.formats.atomic import write_json
from lumen.formats.safetensors import write_file
from lumen.hub import is_id
from lumen.models.decoder import Decoder
from lumen.names import ADAPTER_PREFIX, NameTable
from lumen.nn.experts import ExpertLinear, ExpertLoraPairs, ExpertPair
from lumen.nn.linear import Linear, LoraPair
from lumen.peft_files import CONFIG_FILE, WEIGHTS_FILE, AdapterWeights, adapter_settings, common_value, pattern_value


def attach_lora(model: Decoder, lora: Lora) -> dict[str, LoraPair]:
    """Puts a fresh pair beside each target layer of `model`, which is changed in place; role → pair.

    Everything else is frozen, but for the matrices that `lora.modules_to_save` names. Targets are roles inside a block
    (`attn.q`, `mlp.*`); none, or "all-linear", means the family's own list. The first values of A come from torch's
    global random state, in the order of the layers. ConfigError for a target that names no layer, and for a pattern
    that gives no layer its rank or alpha.
    """
    layers, names = linear_layers(model), model.spec.names
    if lora.rank < 1:
        raise ConfigError(f"lora.rank wants at least 1, found {lora.rank}.")
    chosen = _targets(lora.targets or ["all-linear"], layers, model.spec.lora_targets)
    modules = {role: names.by_role(role).modules for role in chosen}
    _refuse_idle_patterns(lora, [module for own in modules.values() for module in own])
    model.requires_grad_(False)
    for role, own in modules.items():
        rank = common_value(lora.rank_pattern, own, "lora.rank_pattern", ConfigError) or lora.rank
        alpha = common_value(lora.alpha_pattern, own, "lora.alpha_pattern", ConfigError) or lora.alpha
        scale = alpha / (rank**0.5 if lora.rslora else rank)
        pair = layers[role].lora = _new_pair(layers[role], rank, scale, lora.dropout)
        if lora.init == "gaussian":
            torch.nn.init.normal_(pair.a, std=1 / rank)
        if lora.dora:
            _decompose(layers[role], role)
    learn_modules(model, lora.modules_to_save)
    return lora_pairs(model)


def learn_modules(model: Decoder, roles: Iterable[str]) -> None:
    """Lets embedding and head learn whole, beside what learns already; a tied head is the embedding."""
    for role in roles:
        if base_of(matrix(model, role)) is None:
            learn_whole(model, role)


def continue_settings(asked: Lora, kept: Lora, folder: Path | str) -> Lora:
    """The settings of a run that trains the adapter in `folder` further: those that it was made with, `kept`.

    Dropout is the run's, and the run may let more matrices learn whole. ConfigError where it asks for another shape.
    """
    default = Lora()
    for name in ("rank", "alpha", "targets", "rslora", "dora", "init", "rank_pattern", "alpha_pattern"):
        value = getattr(asked, name)
        if value not in (getattr(default, name), getattr(kept, name)):
            raise ConfigError(
                f"lora.{name}={value!r}: the adapter {folder} is trained further as it is, with "
                f"{getattr(kept, name)!r}. Leave lora.{name} out, or begin a new adapter."
            )
    modules = [role for role in ROLES if role in {*asked.modules_to_save, *kept.modules_to_save}]
    return replace(kept, dropout=asked.dropout, modules_to_save=tuple(modules))


def lora_pairs(model: Decoder) -> dict[str, LoraPair]:
    """Role → pair, for every adapted layer."""
    return {role: layer.lora for role, layer in linear_layers(model).items() if layer.lora is not None}


@contextmanager
def disabled(model: Decoder) -> Iterator[Decoder]:
    """Inside the `with`, `model` is its base: the policy that an adapter is compared with."""
    pairs = lora_pairs(model).values()
    with ExitStack() as undo:
        for pair in pairs:
            undo.callback(setattr, pair, "enabled", pair.enabled)
            pair.enabled = False
        for module in learned_whole(model).values():
            undo.callback(setattr, module, "weight", module.weight)
            module.weight = torch.nn.Parameter(base_of(module), requires_grad=False)
        yield model


def save_adapter(model: Decoder, folder: Path | str, lora: Lora, base: str) -> None:
    """Writes the adapter of `model` into an existing folder, in PEFT's layout.

    lora  the settings that it was attached with
    base  path or id of the base model, for whoever loads the adapter later
    """
    names, pairs, layers = model.spec.names, lora_pairs(model), linear_layers(model)
    tensors: dict[str, Tensor] = {}
    settings: dict[str, tuple[int, float]] = {}  # checkpoint module → rank and alpha
    for module, own in _by_module(pairs, names).items():
        rows = {name.role: layers[name.role].outputs for name in names.by_checkpoint(module)}
        a, b, scale = _join_pairs(own, rows)
        tensors[f"{ADAPTER_PREFIX}{module}.lora_A.weight"] = a
        tensors[f"{ADAPTER_PREFIX}{module}.lora_B.weight"] = b
        if lora.dora:
            lengths = [_magnitude(layers[role]) for role in rows]
            tensors[f"{ADAPTER_PREFIX}{module}.lora_magnitude_vector"] = torch.cat(lengths).cpu()
        settings[module] = a.shape[0], scale * (a.shape[0] ** 0.5 if lora.rslora else a.shape[0])
    whole = ROLES if model.head is None and learned_whole(model) else tuple(learned_whole(model))
    for role in whole:
        tensors[f"{names.by_role(role).adapter}.weight"] = matrix(model, role).weight.detach().cpu().clone()
    write_file(Path(folder) / WEIGHTS_FILE, tensors)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        **_base_settings(base),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": "gaussian" if lora.init == "gaussian" else True,
        "target_modules": _target_names(
            settings, [module for role in layers for module in names.by_role(role).modules]
        ),
        "modules_to_save": [names.by_role(role).checkpoint.rpartition(".")[2] for role in whole] or None,
        "ensure_weight_tying": bool(whole) and model.head is None,
        "rank_pattern": _pattern({module: rank for module, (rank, _) in settings.items()}, lora.rank),
        "alpha_pattern": _pattern({module: alpha for module, (_, alpha) in settings.items()}, lora.alpha),
    }
    write_json(Path(folder) / CONFIG_FILE, config)


def _base_settings(base: str) -> dict[str, str | None]:
    """What PEFT calls the base: a path, or an id of the Hub with its revision apart."""
    name, _, revision = base.partition("@") if is_id(base) else (base, "", "")
    return {"base_model_name_or_path": name, "revision": revision or None}


def load_adapter(model: Decoder, folder: Path | str, dropout: float | None = None) -> Lora:
    """Attaches the adapter in `folder` to `model`, in place and ready to train further; the settings to save it with.

    dropout  in training; None: as the adapter was trained

    The model's rows of embedding and head become those of the adapter. CheckpointError for keys or shapes that do not
    fit the model, and for what lumen does not read, as trained biases.
    """
    weights, layers = AdapterWeights.read(folder, model.spec), linear_layers(model)
    dropout = weights.dropout if dropout is None else dropout
    model.requires_grad_(False)
    for role, (a, b) in weights.pairs.items():
        if role not in layers:
            raise CheckpointError(f"{folder}: the adapter changes {role!r}, which is no linear layer of a block.")
        layer, rank = layers[role], a.shape[-2]
        stack = (layer.experts,) if isinstance(layer, ExpertLinear) else ()
        if a.shape != (*stack, rank, layer.inputs) or b.shape != (*stack, layer.outputs, rank):
            raise CheckpointError(
                f"{folder}: {role!r} wants A (R, {layer.inputs}) and B ({layer.outputs}, R), "
                f"found {tuple(a.shape)} and {tuple(b.shape)}. Was the adapter trained on this base model?"
            )
        layer.lora = _new_pair(layer, rank, weights.scale(role), dropout)
        with torch.no_grad():
            layer.lora.a.copy_(a)
            layer.lora.b.copy_(b)
            if role in weights.magnitudes:
                _decompose(layer, role)
                layer.lora.magnitude.copy_(weights.magnitudes[role])
    _load_whole(model, weights)
    return replace(adapter_settings(folder), dropout=dropout, modules_to_save=tuple(learned_whole(model)))


def _load_whole(model: Decoder, weights: AdapterWeights) -> None:
    """Puts the embedding and the head that an adapter brings in the place of the model's own."""
    spec = weights.adapt(model.spec)
    if spec.tied != model.spec.tied:
        untie(model)
    for role, values in weights.whole.items():
        learn_whole(model, role, values)
    set_vocabulary(model, spec.vocab)


def _new_pair(layer: Linear | ExpertLinear, rank: int, scale: float, dropout: float) -> LoraPair | ExpertLoraPairs:
    if isinstance(layer, ExpertLinear):
        return ExpertLoraPairs(layer.experts, layer.inputs, layer.outputs, rank, scale, dropout, layer.device)
    return LoraPair(layer.inputs, layer.outputs, rank, scale, dropout, layer.device)


def _decompose(layer: Linear, role: str) -> None:
    """Makes the pair of a layer a DoRA."""
    if not isinstance(layer, Linear):
        raise ConfigError(f"lora.dora: {role!r} is a stack of experts, of which DoRA is not known. Use LoRA there.")
    layer.lora.decompose(layer.base_weight())


def _magnitude(layer: Linear) -> Tensor:
    """The lengths (out,) of a layer's rows under DoRA: what was learned, or the base's own, which change nothing."""
    if layer.lora is not None:
        return layer.lora.magnitude.detach()
    return torch.linalg.vector_norm(layer.base_weight().detach().float(), dim=1)


def _refuse_idle_patterns(lora: Lora, modules: Iterable[str]) -> None:
    """A pattern that fits no adapted layer is a slip: ConfigError."""
    for key, pattern in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        for word, value in pattern.items():
            try:
                re.compile(word)
            except re.error as error:
                raise ConfigError(f"lora.{key}: {word!r} is no regular expression: {error}.") from None
            if all(pattern_value({word: value}, module, f"lora.{key}") is None for module in modules):
                ends = sorted({module.rpartition(".")[2] for module in modules})
                raise ConfigError(
                    f"lora.{key}: {word!r} fits no adapted layer.{closest(word, ends)} It is a regular expression for "
                    f"a module's path in the checkpoint, or for its end after a dot, such as {', '.join(ends)}."
                )


def _target_names(adapted: Iterable[str], modules: list[str]) -> list[str]:
    """What `target_modules` shall say: the last words of the paths, or the paths, where a word would take in others."""
    adapted = set(adapted)
    words = sorted({module.rpartition(".")[2] for module in adapted})
    taken = {module for module in modules if module.rpartition(".")[2] in words}
    return words if taken <= adapted else sorted(adapted)


def _targets(wanted: Iterable[str], layers: Iterable[str], default: Iterable[str]) -> list[str]:
    """The roles of the layers that `wanted` names, in the model's order."""
    parts = {role: role.split(".", 2)[2] for role in layers}
    # a family's list may name what this model lacks: the MLPs of layers that all have experts
    default = [word for word in default if any(fnmatchcase(part, word) for part in parts.values())]
    words = [word for target in wanted for word in (default if target == "all-linear" else [target])]
    for word in words:
        if not any(fnmatchcase(part, word) for part in parts.values()):
            known = sorted(set(parts.values()))
            raise ConfigError(
                f"lora.targets: {word!r} names no linear layer.{closest(word, known)} Known: {', '.join(known)}."
            )
    return [role for role, part in parts.items() if any(fnmatchcase(part, word) for word in words)]


def _by_module(
    pairs: dict[str, LoraPair | ExpertLoraPairs], names: NameTable
) -> dict[str, dict[str, LoraPair | ExpertPair]]:
    """Checkpoint module → role → pair: several roles of a fused module, one expert's of a stack."""
    modules: dict[str, dict[str, LoraPair | ExpertPair]] = {}
    for role, pair in pairs.items():
        for index, module in enumerate(names.by_role(role).modules):
            modules.setdefault(module, {})[role] = pair[index] if isinstance(pair, ExpertLoraPairs) else pair
    return modules


def _join_pairs(pairs: dict[str, LoraPair], rows: dict[str, int]) -> tuple[Tensor, Tensor, float]:
    """A (R, in), B (out, R) and the scale of one module of the checkpoint, in which the roles of `rows` lie.

    rows  role → its rows, in their order; those without a pair get rows of zeros in B

    The joined pair changes each role as the role's own pair does: B is block-diagonal beside the stacked A's. Pairs
    that share their A, as those of a loaded adapter do until they are trained, keep it, and the rank they came with.
    """
    adapted = {role: pairs[role] for role in rows if role in pairs}
    first, *others = adapted.values()
    shared = all(pair.scale == first.scale and torch.equal(pair.a, first.a) for pair in others)
    a = first.a if shared else torch.cat([pair.a for pair in adapted.values()])
    b = torch.zeros(sum(rows.values()), a.shape[0])
    top = left = 0
    for role, count in rows.items():
        if role in adapted:
            pair = adapted[role]
            rank = pair.a.shape[0]
            b[top : top + count, left : left + rank] = pair.b.detach() * (pair.scale / first.scale)
            left += 0 if shared else rank
        top += count
    return a.detach().cpu(), b, first.scale


def _pattern(values: dict[str, float], default: float) -> dict[str, float]:
    """The modules whose value is not the default, by the last word of their paths where all that end so agree."""
    pattern: dict[str, float] = {}
    found: dict[str, set[float]] = {}  # last word → the values of all modules that end so
    for module, value in values.items():
        found.setdefault(module.rpartition(".")[2], set()).add(value)
    for module, value in values.items():
        word = module.rpartition(".")[2]
        if not math.isclose(value, default):
            pattern[word if len(found[word]) == 1 else module] = value
    return pattern
