"""Low-rank adapters: attach to a model, save and load in PEFT's layout, switch off, read for merging.

On disk an adapter is `adapter_config.json` and `adapter_model.safetensors`, with keys
`base_model.model.<checkpoint module>.lora_A.weight` (R, in) and `.lora_B.weight` (out, R), as PEFT 0.21 writes them, so
that PEFT, vLLM and others read what lumen trained, and lumen reads what PEFT trained.
"""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from lumen.checkpoint import linear_layers
from lumen.config import Lora
from lumen.errors import CheckpointError, ConfigError, closest
from lumen.formats.atomic import write_json
from lumen.formats.safetensors import open_file, write_file
from lumen.models.decoder import Decoder
from lumen.names import ADAPTER_PREFIX, NameTable
from lumen.nn.linear import LoraPair

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

# What PEFT can say in adapter_config.json that lumen does not do: refused unless it has one of the harmless values.
NOT_READ = {
    "use_dora": (None, False),
    "bias": (None, "none"),
    "lora_bias": (None, False),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, {}, []),
    "layer_replication": (None, []),
    "fan_in_fan_out": (None, False),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (None, False),
    "target_parameters": (None, []),
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva"),  # others change the base weights too
}


def attach_lora(model: Decoder, lora: Lora) -> dict[str, LoraPair]:
    """Puts a fresh pair beside each target layer of `model`, which is changed in place; role → pair.

    Everything else is frozen. Targets are roles inside a block (`attn.q`, `mlp.*`); none, or "all-linear", means the
    family's own list. The first values of A come from torch's global random state, in the order of the layers.
    ConfigError for a target that names no layer.
    """
    layers = linear_layers(model)
    if lora.rank < 1:
        raise ConfigError(f"lora.rank wants at least 1, found {lora.rank}.")
    chosen = _targets(lora.targets or model.spec.lora_targets, layers, model.spec.lora_targets)
    model.requires_grad_(False)
    scale = lora.alpha / (lora.rank**0.5 if lora.rslora else lora.rank)
    for role in chosen:
        layer = layers[role]
        layer.lora = LoraPair(layer.inputs, layer.outputs, lora.rank, scale, lora.dropout, layer.device)
    return lora_pairs(model)


def lora_pairs(model: Decoder) -> dict[str, LoraPair]:
    """Role → pair, for every adapted layer."""
    return {role: layer.lora for role, layer in linear_layers(model).items() if layer.lora is not None}


@contextmanager
def disabled(model: Decoder) -> Iterator[Decoder]:
    """Inside the `with`, `model` is its base: the policy that an adapter is compared with."""
    pairs = lora_pairs(model).values()
    before = [pair.enabled for pair in pairs]
    for pair in pairs:
        pair.enabled = False
    try:
        yield model
    finally:
        for pair, enabled in zip(pairs, before, strict=True):
            pair.enabled = enabled


def save_adapter(model: Decoder, folder: Path | str, lora: Lora, base: str) -> None:
    """Writes the adapter of `model` into an existing folder, in PEFT's layout.

    lora  the settings that it was attached with
    base  path or id of the base model, for whoever loads the adapter later
    """
    names, pairs = model.spec.names, lora_pairs(model)
    tensors: dict[str, Tensor] = {}
    for role, pair in pairs.items():
        module = names.by_role(role).adapter
        tensors[f"{module}.lora_A.weight"] = pair.a.detach().cpu()
        tensors[f"{module}.lora_B.weight"] = pair.b.detach().cpu()
    write_file(Path(folder) / WEIGHTS_FILE, tensors)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted({names.by_role(role).checkpoint.rpartition(".")[2] for role in pairs}),
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    write_json(Path(folder) / CONFIG_FILE, config)


def load_adapter(model: Decoder, folder: Path | str) -> dict[str, LoraPair]:
    """Attaches the adapter in `folder` to `model`, in place and ready to train further; role → pair.

    CheckpointError for keys or shapes that do not fit the model, and for what lumen does not read (DoRA, trained
    biases, whole modules).
    """
    weights = AdapterWeights.read(folder, model.spec.names)
    layers = linear_layers(model)
    model.requires_grad_(False)
    for role, (a, b) in weights.pairs.items():
        if role not in layers:
            raise CheckpointError(f"{folder}: the adapter changes {role!r}, which is no linear layer of a block.")
        layer, rank = layers[role], a.shape[0]
        if a.shape != (rank, layer.inputs) or b.shape != (layer.outputs, rank):
            raise CheckpointError(
                f"{folder}: {role!r} wants A (R, {layer.inputs}) and B ({layer.outputs}, R), "
                f"found {tuple(a.shape)} and {tuple(b.shape)}. Was the adapter trained on this base model?"
            )
        layer.lora = LoraPair(layer.inputs, layer.outputs, rank, weights.scale(role), weights.dropout, layer.device)
        with torch.no_grad():
            layer.lora.a.copy_(a)
            layer.lora.b.copy_(b)
    return lora_pairs(model)


@dataclass(frozen=True, kw_only=True)
class AdapterWeights:
    """An adapter as it lies on disk, by role: for attaching, and for merging without building a model."""

    pairs: dict[str, tuple[Tensor, Tensor]]  # role → A (R, in), B (out, R), fp32
    dropout: float
    config: dict
    names: NameTable

    @classmethod
    def read(cls, folder: Path | str, names: NameTable) -> "AdapterWeights":
        """The adapter in `folder`; CheckpointError when it is damaged, incomplete, or says what lumen does not do."""
        folder = Path(folder)
        config = read_adapter_config(folder)
        halves: dict[str, dict[str, Tensor]] = {}
        with open_file(folder / WEIGHTS_FILE) as file:
            for key in file.names():
                role, half = _parse_key(key, names, folder)
                halves.setdefault(role, {})[half] = file.read(key).float()
        for role, found in halves.items():
            if len(found) < 2:
                raise CheckpointError(
                    f"{folder / WEIGHTS_FILE}: {role!r} has only {next(iter(found))}; both A and B are wanted."
                )
        if not halves:
            raise CheckpointError(f"{folder / WEIGHTS_FILE}: holds no LoRA tensors.")
        return cls(
            pairs={role: (found["lora_A"], found["lora_B"]) for role, found in halves.items()},
            dropout=float(config.get("lora_dropout") or 0.0),
            config=config,
            names=names,
        )

    def scale(self, role: str) -> float:
        """alpha / R of one layer, or alpha / sqrt(R); `alpha_pattern` may give a layer its own alpha."""
        checkpoint = self.names.by_role(role).checkpoint
        patterns = self.config.get("alpha_pattern") or {}
        alpha = next(
            (value for key, value in patterns.items() if _pattern_hits(key, checkpoint)), self.config["lora_alpha"]
        )
        rank = self.pairs[role][0].shape[0]
        return alpha / (rank**0.5 if self.config.get("use_rslora") else rank)


def _targets(wanted: Iterable[str], layers: Iterable[str], default: Iterable[str]) -> list[str]:
    """The roles of the layers that `wanted` names, in the model's order."""
    words = [word for target in wanted for word in (default if target == "all-linear" else [target])]
    parts = {role: role.split(".", 2)[2] for role in layers}
    for word in words:
        if not any(fnmatchcase(part, word) for part in parts.values()):
            known = sorted(set(parts.values()))
            raise ConfigError(
                f"lora.targets: {word!r} names no linear layer.{closest(word, known)} Known: {', '.join(known)}."
            )
    return [role for role, part in parts.items() if any(fnmatchcase(part, word) for word in words)]


def read_adapter_config(folder: Path | str) -> dict:
    """`adapter_config.json` of a folder; CheckpointError where it is damaged or says what lumen does not do."""
    path = Path(folder) / CONFIG_FILE
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} does not exist. An adapter folder holds {CONFIG_FILE} and {WEIGHTS_FILE}."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}.") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: wanted a JSON object, found {type(config).__name__}.")
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type wants 'LORA', found {config.get('peft_type')!r}.")
    if not isinstance(config.get("lora_alpha"), int | float):
        raise CheckpointError(f"{path}: lora_alpha wants a number, found {config.get('lora_alpha')!r}.")
    for key, harmless in NOT_READ.items():
        if config.get(key) not in harmless:
            raise CheckpointError(f"{path}: {key} is {config[key]!r}, which lumen does not read.")
    return config


def _parse_key(key: str, names: NameTable, folder: Path) -> tuple[str, str]:
    """`base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight` → ("blocks.0.attn.q", "lora_A")."""
    module, _, half = key.removesuffix(".weight").rpartition(".")
    name = names.by_checkpoint(module.removeprefix(ADAPTER_PREFIX))
    if half not in ("lora_A", "lora_B") or not module.startswith(ADAPTER_PREFIX) or name is None:
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE}: the key {key!r} has no place in this model; wanted keys such as "
            f"{next(iter(names)).adapter}.lora_A.weight. Was the adapter trained on this base model?"
        )
    return name.role, half


def _pattern_hits(pattern: str, checkpoint: str) -> bool:
    """PEFT's rule: a key of a pattern is a regular expression for the whole module path, or for its end after a dot."""
    try:
        return re.fullmatch(rf"(.*\.)?({pattern})", checkpoint) is not None
    except re.error as error:
        raise CheckpointError(f"{CONFIG_FILE}: alpha_pattern: {pattern!r} is no regular expression: {error}.") from None
