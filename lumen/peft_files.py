"""An adapter's folder in PEFT's layout, as PEFT 0.21 writes it: what its keys and its settings mean, role by role.

`adapter_config.json` and `adapter_model.safetensors`, with keys `base_model.model.<checkpoint module>` and

    .lora_A.weight  .lora_B.weight       (R, in) and (out, R), the pair beside a linear layer
    .lora_magnitude_vector               (out,), beside a pair that is DoRA
    .weight                              (V, D), a whole embedding or head that was learned too (`modules_to_save`)

V may be another number of rows than the base has: whoever trained it resized the base first. Where the base ties its
head to the embedding, and only one of the two was learned or they differ, the model with the adapter ties them no more:
PEFT gives each a copy of its own, unless `ensure_weight_tying` was asked for.

An adapter that was trained on a whole vision model names the modules as they lie there, as `model.language_model.norm`;
beside such a base they are read as those of its text half.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from lumen.config import Lora
from lumen.errors import CheckpointError, LumenError
from lumen.formats.json_object import read_object
from lumen.formats.safetensors import open_file
from lumen.names import ADAPTER_PREFIX, NameTable
from lumen.spec import ModelSpec
from lumen.text_half import own_names

LOG = logging.getLogger("lumen")
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
HALVES = ("lora_A", "lora_B", "lora_magnitude_vector")
WHOLE = ("embed", "head")  # roles of the modules that may be learned whole
COPIES = (".original_module", ".modules_to_save")  # what PEFT adds of a resized matrix, and does not read itself

# What PEFT can say in adapter_config.json that lumen does not do: refused unless it has one of the harmless values.
NOT_READ = {
    "bias": (None, "none"),
    "lora_bias": (None, False),
    "trainable_token_indices": (None, {}, []),
    "layer_replication": (None, []),
    "fan_in_fan_out": (None, False),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (None, False),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "target_parameters": (None, []),
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva"),  # others change the base weights too
}
REASONS = {  # for those that people meet
    "bias": "Biases that were trained belong to the base's layers; merge such an adapter with PEFT.",
    "lora_bias": "A bias in the pair belongs to the base's layer; merge such an adapter with PEFT.",
    "trainable_token_indices": "Merge such an adapter with PEFT, or train the whole embedding by modules_to_save.",
    "init_lora_weights": "Such an adapter belongs to a base whose weights were changed; have PEFT convert it to LoRA.",
}


@dataclass(frozen=True, kw_only=True)
class AdapterWeights:
    """An adapter as it lies on disk, by role: for attaching, and for merging without building a model.

    pairs       role → A (R, in), B (out, R), fp32; of a stack of experts (X, R, in), (X, out, R)
    magnitudes  role → (out,) fp32, for every pair of a DoRA adapter, else empty
    whole       "embed" or "head" → (V, D), in the dtype of the file; a tied head is no entry of its own
    tied        whether embedding and head are one matrix, with the adapter
    paths       module of the text model → its path in the model that the adapter was trained on, if that was a vision
                model: PEFT's patterns speak of the latter
    """

    pairs: dict[str, tuple[Tensor, Tensor]]
    magnitudes: dict[str, Tensor]
    whole: dict[str, Tensor]
    tied: bool
    dropout: float
    config: dict
    names: NameTable
    paths: dict[str, str]

    @classmethod
    def read(cls, folder: Path | str, spec: ModelSpec) -> "AdapterWeights":
        """The adapter in `folder`; CheckpointError when it is damaged, incomplete, or says what lumen does not do."""
        folder = Path(folder)
        config = read_adapter_config(folder)
        parts: dict[str, dict[str, Tensor]] = {}
        paths: dict[str, str] = {}
        with open_file(folder / WEIGHTS_FILE) as file:
            for own, key in _own_keys(file.names(), spec, folder).items():
                if place := _parse_key(own, spec.names, folder):
                    module, part = place
                    parts.setdefault(module, {})[part] = file.read(key)
                    paths[module] = key.removeprefix(ADAPTER_PREFIX).removesuffix(".weight").removesuffix(f".{part}")
        whole = {name.role: found.pop("whole") for name, found in _whole_modules(parts, spec)}
        parts = {module: found for module, found in parts.items() if found}
        for module, found in parts.items():
            _check_parts(module, paths[module], found, config, spec.names, folder)
        if not parts and not whole:
            raise CheckpointError(f"{folder / WEIGHTS_FILE}: holds no LoRA tensors.")
        _check_whole(whole, paths, config, spec, folder)
        pairs, magnitudes = _split_pairs(parts, spec, folder)
        tied = spec.tied and not _unties(whole, config)
        if tied and whole:
            whole = {"embed": next(iter(whole.values()))}
        return cls(
            pairs=pairs,
            magnitudes=magnitudes,
            whole=whole,
            tied=tied,
            dropout=float(config.get("lora_dropout") or 0.0),
            config=config,
            names=spec.names,
            paths=paths,
        )

    def scale(self, role: str) -> float:
        """alpha / R of one layer, or alpha / sqrt(R); R is that of the file, of which a role may have a part."""
        modules = [self.paths[module] for module in self.names.by_role(role).modules]
        alpha = common_value(self.config.get("alpha_pattern"), modules, "alpha_pattern", CheckpointError)
        alpha = self.config["lora_alpha"] if alpha is None else alpha
        rank = common_value(self.config.get("rank_pattern"), modules, "rank_pattern", CheckpointError)
        rank = rank or self.config.get("r") or self.pairs[role][0].shape[-2]
        return alpha / (rank**0.5 if self.config.get("use_rslora") else rank)

    def adapt(self, spec: ModelSpec) -> ModelSpec:
        """The base's `spec` as it is with the adapter: rows of embedding and head, and whether these are still one."""
        rows = next((len(values) for values in self.whole.values()), spec.vocab)
        changed = {"vocab_size": rows} if rows != spec.vocab else {}
        changed |= {"tie_word_embeddings": False} if self.tied != spec.tied else {}
        return replace(spec, vocab=rows, tied=self.tied, config=spec.config | changed)


def read_adapter_config(folder: Path | str) -> dict:
    """`adapter_config.json` of a folder; CheckpointError where it is damaged or says what lumen does not do."""
    path = Path(folder) / CONFIG_FILE
    config = read_object(path, CheckpointError, f"An adapter folder holds {CONFIG_FILE} and {WEIGHTS_FILE}.")
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type wants 'LORA', found {config.get('peft_type')!r}.")
    if not _is_number(config.get("lora_alpha")):
        raise CheckpointError(f"{path}: lora_alpha wants a number, found {config.get('lora_alpha')!r}.")
    for key, harmless in NOT_READ.items():
        if config.get(key) not in harmless:
            reason = f" {REASONS[key]}" if key in REASONS else ""
            raise CheckpointError(f"{path}: {key} is {config[key]!r}, which lumen does not read.{reason}")
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict) or not all(_is_number(value) for value in pattern.values()):
            raise CheckpointError(f"{path}: {key} wants an object of numbers, found {pattern!r}.")
    return config


def adapter_settings(folder: Path | str) -> Lora:
    """What the adapter in `folder` was attached with. Its layers and their own ranks are those of its tensors."""
    config = read_adapter_config(folder)
    return Lora(
        rank=config.get("r") or 8,
        alpha=config["lora_alpha"],
        dropout=float(config.get("lora_dropout") or 0.0),
        init="gaussian" if config.get("init_lora_weights") == "gaussian" else "default",
        rslora=bool(config.get("use_rslora")),
        dora=bool(config.get("use_dora")),
        rank_pattern=dict(config.get("rank_pattern") or {}),
        alpha_pattern=dict(config.get("alpha_pattern") or {}),
    )


def adapted_vocabulary(folder: Path | str, spec: ModelSpec) -> int:
    """How many rows embedding and head have with the adapter in `folder`; reads no values."""
    with open_file(Path(folder) / WEIGHTS_FILE) as file:
        stored = _own_keys(file.names(), spec, folder, announce=False)
        keys = [f"{spec.names.by_role(role).adapter}.weight" for role in WHOLE]
        return next((file.shape(stored[key])[0] for key in keys if key in stored), spec.vocab)


def pattern_value(pattern: Mapping[str, float] | None, module: str, where: str) -> float | None:
    """What a `rank_pattern` or `alpha_pattern` says of a module of the checkpoint; None where no key of it fits.

    PEFT's rule: a key is a regular expression for the whole path, or for its end after a dot; the first that fits
    counts. `where` names the pattern in messages.
    """
    for key, value in (pattern or {}).items():
        if _matches(rf"(.*\.)?({key})", key, module, where):
            return value
    return None


def common_value(
    pattern: Mapping[str, float] | None, modules: Iterable[str], where: str, error: type[LumenError]
) -> float | None:
    """`pattern_value` of the modules that hold one role; `error` where the experts of a stack want different ones."""
    if not pattern:
        return None
    values = {module: pattern_value(pattern, module, where) for module in modules}
    if len(set(values.values())) > 1:
        first, other = next((a, b) for a, b in pairwise(values) if values[a] != values[b])
        raise error(
            f"{where}: {first} and {other} are experts of one layer and want one value, found {values[first]} and "
            f"{values[other]} (None: as all others)."
        )
    return next(iter(values.values()))


def is_target(config: Mapping, module: str) -> bool:
    """Whether PEFT puts a pair beside `module` as `target_modules` and `exclude_modules` say."""
    targets, excluded = config.get("target_modules"), config.get("exclude_modules") or []
    if _names(excluded, module, "exclude_modules"):
        return False
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return True
    return targets is None or _names(targets, module, "target_modules")


def _names(wanted: str | list, module: str, key: str) -> bool:
    """One text is a regular expression for the whole path; a list holds paths, or their ends after a dot."""
    if isinstance(wanted, str):
        return _matches(wanted, wanted, module, key)
    return any(module == name or module.endswith(f".{name}") for name in wanted)


def _matches(pattern: str, written: str, module: str, where: str) -> bool:
    try:
        return re.fullmatch(pattern, module) is not None
    except re.error as error:
        raise CheckpointError(f"{where}: {written!r} is no regular expression: {error}.") from None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# --- keys ------------------------------------------------------------------------------------------------------------


def _own_keys(keys: Iterable[str], spec: ModelSpec, folder: Path | str, *, announce: bool = True) -> dict[str, str]:
    """Key as an adapter of the text model has it → the key in the file: another, if a vision model was adapted.

    What the adapter changes of the vision half is left aside, as that half itself is, which `announce` says.
    """
    if spec.text_half is None:
        return {key: key for key in keys}
    stored = {key.removeprefix(ADAPTER_PREFIX): key for key in keys}
    own, aside = own_names(stored, spec.text_half, str(folder))
    if aside and announce:
        LOG.warning("%s: %d tensors of the adapter change the vision half and are left aside.", folder, len(aside))
    return {key if stored[name] == name else ADAPTER_PREFIX + key: stored[name] for key, name in own.items()}


def _parse_key(key: str, names: NameTable, folder: Path) -> tuple[str, str] | None:
    """`base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight` → its module in the checkpoint, and "lora_A".

    "whole" for the whole weight of embedding or head; None for a key that PEFT writes and does not read.
    """
    path = key.removesuffix(".weight")
    module, _, part = path.removeprefix(ADAPTER_PREFIX).rpartition(".")
    whole = {names.by_role(role).checkpoint for role in WHOLE}
    if path.startswith(ADAPTER_PREFIX):
        if path.removeprefix(ADAPTER_PREFIX) in whole:
            return path.removeprefix(ADAPTER_PREFIX), "whole"
        if f".{part}" in COPIES and module in whole:
            return None
        if part in HALVES and names.by_checkpoint(module):
            return module, part
    raise CheckpointError(
        f"{folder / WEIGHTS_FILE}: the key {key!r} has no place in this model; wanted keys such as "
        f"{next(iter(names)).adapter}.lora_A.weight. Was the adapter trained on this base model?"
    )


def _whole_modules(parts: dict[str, dict[str, Tensor]], spec: ModelSpec):
    for role in WHOLE:
        name = spec.names.by_role(role)
        if "whole" in parts.get(name.checkpoint, {}):
            yield name, parts[name.checkpoint]


def _check_parts(
    module: str, path: str, found: dict[str, Tensor], config: dict, names: NameTable, folder: Path
) -> None:
    """CheckpointError where the tensors of one module are not all there, or not what adapter_config.json says.

    path  of the module in the model that the adapter was trained on
    """
    where, wanted = folder / WEIGHTS_FILE, HALVES if config.get("use_dora") else HALVES[:2]
    if role := next((role for role in WHOLE if names.by_role(role).checkpoint == module), None):
        raise CheckpointError(f"{where}: the adapter changes {role!r}, which is no linear layer of a block.")
    if missing := [part for part in wanted if part not in found]:
        raise CheckpointError(
            f"{where}: {module!r} has only {', '.join(found)}; both A and B are wanted, and with use_dora a magnitude: "
            f"{missing[0]} is missing."
        )
    if extra := [part for part in found if part not in wanted]:
        raise CheckpointError(f"{where}: {module!r} has {extra[0]}, but use_dora is not set in {CONFIG_FILE}.")
    if not is_target(config, path):
        raise CheckpointError(
            f"{where}: holds a pair for {path!r}, which target_modules in {CONFIG_FILE} leaves out: "
            f"{config.get('target_modules')!r}. PEFT would not use it. Do the two files belong together?"
        )
    rank = pattern_value(config.get("rank_pattern"), path, "rank_pattern") or config.get("r")
    if rank is not None and rank != found["lora_A"].shape[0]:
        raise CheckpointError(
            f"{where}: A of {module!r} has {found['lora_A'].shape[0]} rows, but {CONFIG_FILE} says rank {rank}."
        )


def _check_whole(whole: dict[str, Tensor], paths: dict[str, str], config: dict, spec: ModelSpec, folder: Path) -> None:
    """CheckpointError for matrices that are named and missing, or whose shapes fit neither the base nor each other."""
    where, names = folder / WEIGHTS_FILE, {role: spec.names.by_role(role).checkpoint for role in WHOLE}
    for wanted in config.get("modules_to_save") or []:
        if not any(paths[names[role]].endswith(wanted) for role in whole):
            raise CheckpointError(
                f"{where}: modules_to_save names {wanted!r}, of which there is no weight. lumen reads "
                f"{' and '.join(names.values())} whole, and nothing else."
            )
    for role, values in whole.items():
        if values.ndim != 2 or values.shape[1] != spec.dim:
            raise CheckpointError(
                f"{where}: {names[role]!r} wants shape (V, {spec.dim}), found {tuple(values.shape)}. "
                "Was the adapter trained on this base model?"
            )
    # one of two matrices keeps the base's rows
    both = set(whole) == set(WHOLE) or (spec.tied and not config.get("modules_to_save"))
    rows = {len(values) for values in whole.values()} | (set() if both or not whole else {spec.vocab})
    if len(rows) > 1:
        raise CheckpointError(f"{where}: embedding and head have {' and '.join(map(str, sorted(rows)))} rows.")


def _unties(whole: dict[str, Tensor], config: dict) -> bool:
    """Whether embedding and head differ in a model that had one matrix for both."""
    if len(whole) == len(WHOLE):
        return not torch.equal(*whole.values())
    return bool(whole) and bool(config.get("modules_to_save"))


def _split_pairs(
    parts: dict[str, dict[str, Tensor]], spec: ModelSpec, folder: Path
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Checkpoint module → its A and B becomes role → A and B: roles of one module have rows of B each, and share A.

    The second result are the magnitudes, where there are any.
    """
    rows = {tensor.role.removesuffix(".weight"): tensor.shape[0] for tensor in spec.tensors()}
    pairs = _stack_pairs(parts, spec.names, folder)
    magnitudes: dict[str, Tensor] = {}
    for module, found in parts.items():
        roles = [name.role for name in spec.names.by_checkpoint(module) if not name.stack]
        if not roles:
            continue
        a, b, *magnitude = (found[part].float() for part in HALVES if part in found)
        counts = [rows[role] for role in roles] if len(roles) > 1 else [b.shape[0]]
        if b.shape[0] != sum(counts) or any(values.shape != b.shape[:1] for values in magnitude):
            raise CheckpointError(
                f"{folder / WEIGHTS_FILE}: B of {module!r} wants {sum(counts)} rows, found {b.shape[0]}, "
                f"and magnitudes {[tuple(values.shape) for values in magnitude]}. "
                "Was the adapter trained on this base model?"
            )
        own = {role: (a, part) for role, part in zip(roles, b.split(counts), strict=True)}
        pairs |= own if magnitude else _own_components(own)
        for values in magnitude:
            magnitudes |= dict(zip(roles, values.split(counts), strict=True))
    return pairs, magnitudes


def _stack_pairs(
    parts: dict[str, dict[str, Tensor]], names: NameTable, folder: Path
) -> dict[str, tuple[Tensor, Tensor]]:
    """Role → A (X, R, in) and B (X, out, R) of the stacks of experts, whose modules each bring one A and one B."""
    where = folder / WEIGHTS_FILE
    stacks = {name.role: name for module in parts for name in names.by_checkpoint(module) if name.stack}
    pairs = {}
    for role, name in stacks.items():
        if missing := [module for module in name.modules if module not in parts]:
            raise CheckpointError(
                f"{where}: wants a pair for each of the {name.stack} experts of {role!r}, found none for "
                f"{missing[0]!r}."
            )
        found = [parts[module] for module in name.modules]
        if "lora_magnitude_vector" in found[0]:
            raise CheckpointError(f"{where}: {role!r} is a stack of experts, of which DoRA is not known.")
        halves = [[expert[half].float() for expert in found] for half in ("lora_A", "lora_B")]
        for shapes in ({tuple(half.shape) for half in own} for own in halves):
            if len(shapes) > 1:
                raise CheckpointError(f"{where}: the experts of {role!r} want pairs of one shape, found {shapes}.")
        pairs[role] = torch.stack(halves[0]), torch.stack(halves[1])
    return pairs


def _own_components(pairs: dict[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs that share A, as the separate pairs that `save_adapter` joined in it; as they are where it did not.

    In a joined pair every component of the rank acts on one role alone. Left together the components would change as
    much, but they would train otherwise than before, and have a multiple of the rank when they are saved again.
    """
    used = torch.stack([b.any(dim=0) for _, b in pairs.values()])  # (roles, R)
    if len(pairs) == 1 or (used.sum(dim=0) != 1).any():
        return pairs
    return {role: (a[own], b[:, own]) for (role, (a, b)), own in zip(pairs.items(), used, strict=True) if own.any()}
