"""The names of a tensor: role (inside lumen), checkpoint (safetensors), GGUF, adapter (PEFT); and how its values change
with them.

A *role* says what a tensor is for: `blocks.3.attn.q`. Checkpoint words lie across families (`post_attention_layernorm`
is the norm before the MLP in Llama and the norm after attention in Gemma 2), so everything inside lumen speaks in
roles, and one row of a page in `model_specs/` translates:

    attn.q = ["self_attn.q_proj", "attn_q", "rope_pairs"]       role = [checkpoint, GGUF, transform to GGUF]

Roles, checkpoint names and GGUF names here are those of modules; a tensor adds `.weight` or `.bias`.

A file may hold several roles in one tensor. Rows of the page that name the same tensor lie in it one below the other,
in the order of the page; that is said of the checkpoint and of the GGUF file each for itself:

    attn.q = ["self_attn.qkv_proj", "attn_qkv"]
    attn.k = ["self_attn.qkv_proj", "attn_qkv"]

A role may also be a stack of several tensors of a checkpoint, one an expert, whose number stands in the place of `*`;
in a GGUF file such a stack is one tensor too:

    mlp.experts.up = ["mlp.experts.*.up_proj", "ffn_up_exps"]

`Part` says where one role lies in the tensors of a checkpoint, `FileTensor` what one tensor of a file is made of.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby

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
    stack: int = 0  # slices along the role's first axis, each a module of the checkpoint; 0: it is no stack

    @property
    def modules(self) -> tuple[str, ...]:
        """The checkpoint's modules that hold it: one, or one for each slice of a stack."""
        numbers = range(self.stack)
        return tuple(self.checkpoint.replace("*", str(i)) for i in numbers) if numbers else (self.checkpoint,)

    @property
    def adapter(self) -> str:
        """The module path that PEFT writes, without `.lora_A.weight`."""
        return ADAPTER_PREFIX + self.checkpoint


@dataclass(frozen=True, kw_only=True)
class Part:
    """Values of a role in a checkpoint: rows `first` to `first + rows` of its tensor `name`.

    index  which slice along the role's first axis they are, one of a stack; None: they are all of the role
    """

    name: str  # model.layers.3.self_attn.qkv_proj.weight
    first: int
    rows: int
    index: int | None = None


@dataclass(frozen=True, kw_only=True)
class TensorName:
    """One tensor of a model: its three names, its shape, where it lies in a checkpoint and how it goes into a GGUF."""

    role: str  # blocks.3.attn.q.weight
    checkpoint: str
    gguf: str
    shape: tuple[int, ...]
    transform: str
    heads: int  # heads in the tensor's rows, for `rope_pairs`
    parts: tuple[Part, ...]  # one; or one for each slice of a stack
    exact: bool = False  # stays in fp32: rounding it would not be a small error

    def part_shape(self, part: Part) -> tuple[int, ...]:
        return self.shape if part.index is None else self.shape[1:]


@dataclass(frozen=True, kw_only=True)
class FileTensor:
    """One tensor of a file: the values of its pieces, one below the other."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[tuple[TensorName, Part], ...]


def checkpoint_tensors(tensors: Iterable[TensorName]) -> list[FileTensor]:
    """What a checkpoint of these roles holds, in their order."""
    pieces = [(part.name, tensor, part) for tensor in tensors for part in tensor.parts]
    return _file_tensors(pieces)


def gguf_tensors(tensors: Iterable[TensorName]) -> list[FileTensor]:
    """What a GGUF file of these roles holds, in their order; a stack is one tensor there as it is one role here."""
    whole = [(tensor, Part(name=tensor.gguf, first=0, rows=tensor.shape[0])) for tensor in tensors]
    return _file_tensors([(tensor.gguf, tensor, part) for tensor, part in whole])


def _file_tensors(named: list[tuple[str, TensorName, Part]]) -> list[FileTensor]:
    pieces: dict[str, list[tuple[TensorName, Part]]] = {}
    for name, tensor, part in named:
        pieces.setdefault(name, []).append((tensor, part))
    tensors = []
    for name, own in pieces.items():
        shapes = [tensor.part_shape(part) for tensor, part in own]
        shape = (sum(rows for rows, *_ in shapes), *shapes[0][1:])
        tensors.append(FileTensor(name=name, shape=shape, pieces=tuple(own)))
    return tensors


class NameTable:
    """The rows of one page, for one depth: every module by its role, its checkpoint name and its GGUF name."""

    def __init__(
        self, rows: dict[str, list[str]], block_rows: dict[str, list[str]], depth: int, where: str, experts: int = 0
    ):
        """rows: `{"embed": ["model.embed_tokens", "token_embd"], …}`, among them `blocks`, the prefixes of a block.

        experts  how many there are in a layer: slices of each row whose checkpoint name holds a `*`
        """
        rows = dict(rows)
        if "blocks" not in rows:
            raise SpecError(f"{where}: [tensors] wants a row 'blocks' = [checkpoint prefix, GGUF prefix].")
        checkpoint_prefix, gguf_prefix = rows.pop("blocks")
        names = [_module_name(role, row, where, experts) for role, row in rows.items()]
        for block in range(depth):
            for role, row in block_rows.items():
                name = _module_name(role, row, where, experts)
                names.append(
                    ModuleName(
                        role=f"blocks.{block}.{role}",
                        checkpoint=f"{checkpoint_prefix}.{block}.{name.checkpoint}",
                        gguf=f"{gguf_prefix}.{block}.{name.gguf}",
                        transform=name.transform,
                        stack=name.stack,
                    )
                )
        self._by_role = {name.role: name for name in names}
        self._by_checkpoint: dict[str, tuple[ModuleName, ...]] = {}
        for modules, rows_of_one in groupby(names, lambda name: name.modules):
            if modules[0] in self._by_checkpoint:
                raise SpecError(f"{where}: rows of [tensors] that name {modules[0]!r} must follow each other.")
            self._by_checkpoint |= dict.fromkeys(modules, tuple(rows_of_one))
        runs = [key for key, _ in groupby(names, lambda name: name.gguf)]
        if len(set(runs)) < len(runs):
            raise SpecError(f"{where}: rows of [tensors] that share a GGUF name must follow each other.")

    def __iter__(self):
        return iter(self._by_role.values())

    def by_role(self, role: str) -> ModuleName:
        return self._by_role[role]

    def by_checkpoint(self, name: str) -> tuple[ModuleName, ...]:
        """The rows that lie in the checkpoint's module `name`, in their order; empty when there is no such module."""
        return self._by_checkpoint.get(name, ())


def _module_name(role: str, row: list[str], where: str, experts: int) -> ModuleName:
    if len(row) not in (2, 3):
        raise SpecError(
            f"{where}: tensors.{role} wants [checkpoint, GGUF] or [checkpoint, GGUF, transform], found {row}."
        )
    transform = row[2] if len(row) == 3 else "same"
    if transform not in TRANSFORMS:
        raise SpecError(f"{where}: tensors.{role} names the transform {transform!r}.{closest(transform, TRANSFORMS)}")
    stack = experts if "*" in row[0] else 0
    if "*" in row[0] and not experts:
        raise SpecError(f"{where}: tensors.{role} wants one tensor an expert, and the page has no section [experts].")
    return ModuleName(role=role, checkpoint=row[0], gguf=row[1], transform=transform, stack=stack)
