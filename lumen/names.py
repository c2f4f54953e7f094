"""The names of a tensor: role (inside lumen), checkpoint (safetensors), GGUF, adapter (PEFT); and how its values change
with them.

A *role* says what a tensor is for: `blocks.3.attn.q`. Checkpoint words lie across families (`post_attention_layernorm`
is the norm before the MLP in Llama and the norm after attention in Gemma 2), so everything inside lumen speaks in
roles, and one row of a page in `model_specs/` translates:

    attn.q = ["self_attn.q_proj", "attn_q", "rope_pairs"]       role = [checkpoint, GGUF, transform to GGUF]

Roles, checkpoint names and GGUF names here are those of modules; a tensor adds `.weight` or `.bias`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lumen.errors import SpecError, closest

ADAPTER_PREFIX = "base_model.model."  # PEFT stores the module path as seen from its own wrapper


@dataclass(frozen=True, kw_only=True)
class Transform:
    """A change of values between a checkpoint and a GGUF file; `heads` is the number of heads in the tensor's rows."""

    to_gguf: Callable[[Tensor, int], Tensor]
    from_gguf: Callable[[Tensor, int], Tensor]


def _halves_to_neighbours(rows: Tensor, heads: int) -> Tensor:
    """Rows (H·E, …) or (H·E,): within each head, from (first half, second half) to pairs of neighbours.

    Checkpoints rotate component i with i + E/2; llama.cpp's arch `llama` rotates 2i with 2i + 1.
    """
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _neighbours_to_halves(rows: Tensor, heads: int) -> Tensor:
    return rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


TRANSFORMS = {
    "same": Transform(to_gguf=lambda tensor, heads: tensor, from_gguf=lambda tensor, heads: tensor),
    "rope_pairs": Transform(to_gguf=_halves_to_neighbours, from_gguf=_neighbours_to_halves),
    # Gemma's norms multiply by 1 + w, llama.cpp's by w; the sum is taken in fp32
    "plus_one": Transform(
        to_gguf=lambda tensor, heads: tensor.float() + 1.0, from_gguf=lambda tensor, heads: tensor.float() - 1.0
    ),
}


@dataclass(frozen=True, kw_only=True)
class ModuleName:
    """One row of the table, its block number filled in."""

    role: str  # blocks.3.attn.q
    checkpoint: str  # model.layers.3.self_attn.q_proj
    gguf: str  # blk.3.attn_q
    transform: str = "same"

    @property
    def adapter(self) -> str:
        """The module path that PEFT writes, without `.lora_A.weight`."""
        return ADAPTER_PREFIX + self.checkpoint


class NameTable:
    """The rows of one page, for one depth: every module by its role, its checkpoint name and its GGUF name."""

    def __init__(self, rows: dict[str, list[str]], block_rows: dict[str, list[str]], depth: int, where: str):
        """rows: `{"embed": ["model.embed_tokens", "token_embd"], …}`, among them `blocks`, the prefixes of a block."""
        rows = dict(rows)
        if "blocks" not in rows:
            raise SpecError(f"{where}: [tensors] wants a row 'blocks' = [checkpoint prefix, GGUF prefix].")
        checkpoint_prefix, gguf_prefix = rows.pop("blocks")
        names = [_module_name(role, row, where) for role, row in rows.items()]
        for block in range(depth):
            for role, row in block_rows.items():
                name = _module_name(role, row, where)
                names.append(
                    ModuleName(
                        role=f"blocks.{block}.{role}",
                        checkpoint=f"{checkpoint_prefix}.{block}.{name.checkpoint}",
                        gguf=f"{gguf_prefix}.{block}.{name.gguf}",
                        transform=name.transform,
                    )
                )
        self._by_role = {name.role: name for name in names}
        self._by_checkpoint = {name.checkpoint: name for name in names}
        if len(self._by_checkpoint) < len(names) or len({name.gguf for name in names}) < len(names):
            raise SpecError(f"{where}: two rows of [tensors] give the same name.")

    def __iter__(self):
        return iter(self._by_role.values())

    def by_role(self, role: str) -> ModuleName:
        return self._by_role[role]

    def by_checkpoint(self, name: str) -> ModuleName | None:
        """The row whose checkpoint name is `name`, or None when the page has no such module."""
        return self._by_checkpoint.get(name)


def _module_name(role: str, row: list[str], where: str) -> ModuleName:
    if len(row) not in (2, 3):
        raise SpecError(
            f"{where}: tensors.{role} wants [checkpoint, GGUF] or [checkpoint, GGUF, transform], found {row}."
        )
    transform = row[2] if len(row) == 3 else "same"
    if transform not in TRANSFORMS:
        raise SpecError(f"{where}: tensors.{role} names the transform {transform!r}.{closest(transform, TRANSFORMS)}")
    return ModuleName(role=role, checkpoint=row[0], gguf=row[1], transform=transform)
