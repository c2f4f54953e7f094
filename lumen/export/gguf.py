"""A model folder becomes one GGUF file that llama.cpp runs like the model that was trained, proven before it is named.

What llama.cpp does not find in the file it replaces by a default, mostly without a word: an absent `rope.freq_base` or
`rope_freqs.weight`, rows of q and k in the wrong order all load, and give other logits. So everything comes from the
`ModelSpec` and its name table, the same that the forward pass reads; nothing is left to a default; and the finished
file is read back, its values held against the source.

Which tensors get which type: those of one dimension (norms) and routers are f32; others get the type asked for, or
f16 where its blocks do not divide the row, which the report says.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor

from lumen.checkpoint import join_pieces, open_checkpoint, read_tensor
from lumen.errors import ConfigError, ExportError, SpecError, closest
from lumen.formats.atomic import replacing
from lumen.formats.blocks import CODECS
from lumen.formats.gguf import GGUFFile, GGUFTensor, Value, read_gguf, write_gguf_file
from lumen.formats.safetensors import TensorFiles
from lumen.names import TRANSFORMS, FileTensor, Part, TensorName, gguf_tensors
from lumen.nn.rope import llama3_divisors
from lumen.spec import ModelSpec
from lumen.text.tokenizer import Tokenizer, load_tokenizer
from lumen.text.vocab import GGUFVocab, gguf_vocab

FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}  # quant → llama.cpp's number for a file of it
QUANTIZED = {"q8_0"}
QUANTIZATION_VERSION = 2
FALLBACK = "f16"
LLAMA_CPP_YARN = (32, 1, True)  # what it reads into a file of an arch whose betas it does not ask for
CHUNK_ELEMENTS = 2**22  # encoded at a time: 16 MiB as fp32

# Tensors that llama.cpp wants and no checkpoint holds, by the word in a page's `gguf.extra`.
EXTRA_TENSORS: dict[str, Callable[[ModelSpec], Tensor]] = {
    "rope_freqs": lambda spec: llama3_divisors(spec.rope),
    "rope_factors_long": lambda spec: torch.tensor(spec.rope.long),
    "rope_factors_short": lambda spec: torch.tensor(spec.rope.short),
}


@dataclass(frozen=True, kw_only=True)
class GGUFReport:
    """What was written.

    types        how many tensors there are of each type
    fallbacks    a sentence for each tensor that did not get the type asked for
    differences  a sentence for each kind of text that llama.cpp cuts into other ids than lumen, and for each
                 number that it takes for another
    """

    path: Path
    quant: str
    size_bytes: int
    types: dict[str, int]
    fallbacks: tuple[str, ...]
    differences: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _PlannedTensor:
    """One tensor of the file: `read` gives the values it shall hold, in the source's dtype and torch's shape."""

    name: str
    shape: tuple[int, ...]
    type: str
    read: Callable[[], Tensor]

    def row_chunks(self) -> Iterator[Tensor]:
        """(rows, columns), in order and in pieces of about `CHUNK_ELEMENTS`."""
        columns = self.shape[-1]
        yield from self.read().reshape(-1, columns).split(max(1, CHUNK_ELEMENTS // columns))

    def encoded(self) -> Iterator[Tensor]:
        """The bytes of the file; ExportError for values that the type cannot hold."""
        for rows in self.row_chunks():
            self._refuse_overflow(rows)
            yield CODECS[self.type].encode(rows)

    def _refuse_overflow(self, rows: Tensor) -> None:
        if not rows.isfinite().all():
            raise ExportError(f"{self.name}: wanted finite weights, found NaN or infinity. Did the training diverge?")
        found, largest = rows.abs().max().item(), CODECS[self.type].largest
        if found > largest:
            raise ExportError(
                f"{self.name}: {self.type} holds magnitudes up to {largest:g}, found {found:g}. Export as bf16, "
                f"which has the range of the weights."
            )


@dataclass(frozen=True, kw_only=True)
class _PlannedFile:
    """All of a file before it is written; `fallbacks` and `differences` are those of the report."""

    metadata: dict[str, Value]
    tensors: list[_PlannedTensor]
    fallbacks: tuple[str, ...]
    differences: tuple[str, ...]


def write_gguf(model_folder: Path | str, out_path: Path | str, quant: str, *, name: str = "") -> GGUFReport:
    """Writes the model in `model_folder` (config.json, safetensors, tokenizer) as the GGUF file `out_path`.

    quant  f32, f16, bf16 or q8_0
    name   what the file calls the model; empty takes the folder's name

    Holds one tensor at a time. `out_path` changes only after the file was read back and every value lies within the
    type's rounding of its source; otherwise, and for weights that the type cannot hold, an ExportError.
    """
    out_path = Path(out_path)
    with _planned_file(Path(model_folder), quant, name) as planned:
        tensors = [GGUFTensor(name=t.name, shape=t.shape, type=t.type, chunks=t.encoded) for t in planned.tensors]
        with replacing(out_path) as unnamed:
            write_gguf_file(unnamed, planned.metadata, tensors)
            _check(unnamed, planned)
    return GGUFReport(
        path=out_path,
        quant=quant,
        size_bytes=out_path.stat().st_size,
        types=dict(Counter(tensor.type for tensor in planned.tensors)),
        fallbacks=planned.fallbacks,
        differences=planned.differences,
    )


def check_gguf(path: Path | str, model_folder: Path | str, quant: str, *, name: str = "") -> None:
    """Holds the file `path` against what `write_gguf` would write; ExportError names the first difference."""
    with _planned_file(Path(model_folder), quant, name) as planned:
        _check(Path(path), planned)


# --- the plan --------------------------------------------------------------------------------------------------------


@contextmanager
def _planned_file(folder: Path, quant: str, name: str) -> Iterator[_PlannedFile]:
    """The plan for a model folder, whose weights stay open meanwhile."""
    if quant not in FILE_TYPES:
        raise ConfigError(f"quant is {quant!r}; known: {', '.join(FILE_TYPES)}.{closest(quant, FILE_TYPES)}")
    spec, files = open_checkpoint(folder)
    with files:
        tokenizer = load_tokenizer(folder)
        vocab = gguf_vocab(tokenizer, spec.vocab)
        chosen = [(tensor, *_choose_type(tensor, quant)) for tensor in gguf_tensors(spec.tensors())]
        tensors = [
            _PlannedTensor(name=tensor.name, shape=tensor.shape, type=kind, read=partial(_read, files, tensor))
            for tensor, kind, _ in chosen
        ]
        tensors += _extra_tensors(spec)
        yield _PlannedFile(
            metadata={
                **_general_metadata(spec, _model_name(name or folder.resolve().name, tokenizer), quant, tensors),
                **_model_metadata(spec),
                **_vocab_metadata(vocab, tokenizer.chat_template),
            },
            tensors=tensors,
            fallbacks=tuple(reason for _, _, reason in chosen if reason),
            differences=told_of_llama_cpp(spec)
            + tuple(
                line
                for line in vocab.differences
                if not (_drops_blanks(tokenizer) and line.startswith("Blanks beside"))
            ),
        )


def _choose_type(tensor: FileTensor, quant: str) -> tuple[str, str]:
    """The type of a tensor, and why it is not the one asked for, if rows do not fit; else an empty text."""
    exact = len(tensor.shape) == 1 or any(name.exact for name, _ in tensor.pieces)
    kind = "f32" if exact else quant
    columns, block = tensor.shape[-1], CODECS[kind].block
    if columns % block == 0:
        return kind, ""
    return (
        FALLBACK,
        f"{tensor.name} is {FALLBACK}: its rows of {columns} are no multiple of {block}, the block of {kind}.",
    )


def _extra_tensors(spec: ModelSpec) -> list[_PlannedTensor]:
    tensors = []
    for word in spec.gguf.extra:
        if word not in EXTRA_TENSORS:
            raise SpecError(f"model_specs/{spec.name}.toml: gguf.extra: {word!r}.{closest(word, EXTRA_TENSORS)}")
        shape = tuple(EXTRA_TENSORS[word](spec).shape)
        read = partial(EXTRA_TENSORS[word], spec)
        tensors.append(_PlannedTensor(name=f"{word}.weight", shape=shape, type="f32", read=read))
    return tensors


def _read(files: TensorFiles, tensor: FileTensor) -> Tensor:
    def transformed(name: TensorName, part: Part) -> Tensor:
        return TRANSFORMS[name.transform].to_gguf(read_tensor(files, name), name.heads)

    return join_pieces(tensor, transformed)


# --- metadata --------------------------------------------------------------------------------------------------------


def _model_name(name: str, tokenizer: Tokenizer) -> str:
    """`name`, so that llama.cpp reads of it what is true of the tokenizer.

    By a name that holds "phi3" or "phi-3", and by nothing else in the file, it knows that blanks behind special tokens
    are dropped, as Phi-3's tokenizer does; and with such a name it does not load a vocabulary without `</s>`.
    """
    said = re.search(r"phi-?3", name, re.IGNORECASE) is not None
    if said == _drops_blanks(tokenizer):
        return name
    return re.sub(r"phi-?3", "Phi 3", name, flags=re.IGNORECASE) if said else f"{name} (Phi-3)"


def _drops_blanks(tokenizer: Tokenizer) -> bool:
    """Whether blanks behind special tokens are dropped in the way of Phi-3, the only one that llama.cpp knows."""
    document = json.loads(tokenizer.files.get("tokenizer.json", "{}"))
    return any(token["content"] == "</s>" and token["rstrip"] for token in document.get("added_tokens", []))


def _general_metadata(spec: ModelSpec, name: str, quant: str, tensors: list[_PlannedTensor]) -> dict[str, Value]:
    metadata = {
        "general.architecture": Value("string", spec.gguf.arch),
        "general.type": Value("string", "model"),
        "general.name": Value("string", name),
        "general.size_label": Value("string", size_label(sum(math.prod(tensor.shape) for tensor in tensors))),
        "general.file_type": Value("u32", FILE_TYPES[quant]),
    }
    if quant in QUANTIZED:
        metadata["general.quantization_version"] = Value("u32", QUANTIZATION_VERSION)
    return metadata


def size_label(parameters: int) -> str:
    """`1.2B` for 1,235,814,400: two digits at least, as the names of GGUF files customarily have it."""
    for unit, factor in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if parameters >= factor or unit == "K":
            value = parameters / factor
            return f"{value:.{1 if round(value) < 10 else 0}f}{unit}"
    raise AssertionError(parameters)


def _model_metadata(spec: ModelSpec) -> dict[str, Value]:
    """What llama.cpp must know of the arithmetic, under the architecture's own prefix.

    ExportError for a scale of attention, or a way with experts, that the file cannot say.
    """
    _check_scale(spec)
    _check_experts(spec)
    values = {
        "context_length": Value("u32", spec.context_length),
        "embedding_length": Value("u32", spec.dim),
        "block_count": Value("u32", len(spec.layers)),
        "feed_forward_length": Value("u32", spec.mlp_dim),
        "vocab_size": Value("u32", spec.vocab),
        "attention.head_count": Value("u32", spec.heads),
        "attention.head_count_kv": Value("u32", spec.kv_heads),
        "attention.key_length": Value("u32", spec.head_dim),
        "attention.value_length": Value("u32", spec.head_dim),
        "attention.layer_norm_rms_epsilon": Value("f32", spec.norm_eps),
        "rope.dimension_count": Value("u32", spec.rope.turned),
        "rope.freq_base": Value("f32", spec.rope.theta),
        **_rope_scaling(spec),
    }
    for key, field in spec.gguf.metadata.items():
        number = _from_config(spec, field) if field.startswith("config.") else attrgetter(field)(spec)
        values[key] = Value("u32" if isinstance(number, int) else "f32", number)
    return {f"{spec.gguf.arch}.{key}": value for key, value in values.items()}


def _from_config(spec: ModelSpec, field: str) -> int:
    """A whole number that nothing but the file is concerned with; ExportError where config.json lacks it."""
    key = field.removeprefix("config.")
    if type(found := spec.config.get(key)) is not int or found < 0:
        raise ExportError(
            f"{spec.name}: config.json: {key} wants a whole number, found {found!r}. Without it a GGUF file of arch "
            f"{spec.gguf.arch!r} would fit no projector file. Export the vision checkpoint itself, or write it there."
        )
    return found


def _rope_scaling(spec: ModelSpec) -> dict[str, Value]:
    """How `spec.rope` differs from a plain one; ExportError for a yarn that llama.cpp cannot do.

    Between longrope's lists llama.cpp chooses by the context that it is opened with, not by the length of a text.
    """
    rope = spec.rope
    if rope.kind == "mrope":
        return {"rope.dimension_sections": Value("i32[]", (*rope.sections, 0))}  # it wants four
    if rope.kind == "linear" and rope.factor != 1:
        return {"rope.scaling.type": Value("string", "linear"), "rope.scaling.factor": Value("f32", rope.factor)}
    if rope.kind not in ("yarn", "longrope"):
        return {}
    values = {
        "rope.scaling.type": Value("string", rope.kind),
        "rope.scaling.original_context_length": Value("u32", rope.trained_length),
        "rope.scaling.attn_factor": Value("f32", rope.attention_factor),
    }
    if rope.kind == "yarn":
        if (rope.beta_fast, rope.beta_slow, rope.truncate) != LLAMA_CPP_YARN:
            raise ExportError(
                f"{spec.name}: llama.cpp knows yarn with beta_fast, beta_slow and truncate at {LLAMA_CPP_YARN}, and "
                f"this model was made for {(rope.beta_fast, rope.beta_slow, rope.truncate)}."
            )
        # llama.cpp multiplies by the factor of the yarn paper itself; the key says by what beyond it
        values["rope.scaling.attn_factor"] = Value("f32", rope.attention_factor / (0.1 * math.log(rope.factor) + 1))
        values["rope.scaling.factor"] = Value("f32", rope.factor)  # of longrope it would squeeze the positions as well
    return values


def told_of_llama_cpp(spec: ModelSpec) -> tuple[str, ...]:
    """What llama.cpp computes otherwise than the file says, where that is too little to refuse it."""
    rope, told = spec.rope, []
    if not spec.gguf.reads_norm_eps:
        told.append(
            f"Norms: in a {spec.gguf.arch!r} model llama.cpp 0.5.0 adds no epsilon (older versions may), and this one "
            f"was made for {spec.norm_eps:g}: its logits differ slightly."
        )
    # Once height or width has all its pairs, time has what would have been theirs; llama.cpp turns those by a fourth
    # part of a position, which is 0 in a text.
    pairs = range(rope.turned // 2 if rope.kind == "mrope" and rope.interleaved else 0)
    if still := [pair for pair in pairs if pair >= 3 * rope.sections[pair % 3]]:
        angle = spec.context_length * rope.theta ** (-2 * still[0] / rope.turned)
        told.append(
            f"Positions: {len(still)} of the {len(pairs)} pairs of a head, which turn by {angle:.2g} radians at most "
            f"within the context of {spec.context_length} tokens, llama.cpp does not turn in a text."
        )
    return tuple(told)


def _check_scale(spec: ModelSpec) -> None:
    """llama.cpp reads no scale of attention from these files: it takes the root of a width that it derives itself."""
    by_width = len(spec.layers) == spec.gguf.width_scale_depth
    theirs = (spec.dim // spec.heads if by_width else spec.head_dim) ** -0.5
    if not math.isclose(spec.scale, theirs):
        raise ExportError(
            f"{spec.name}: llama.cpp multiplies q·k by {theirs:g} in a {spec.gguf.arch!r} model of {len(spec.layers)} "
            f"layers, and this one was made for {spec.scale:g}. A GGUF file of it would give other answers."
        )


def _check_experts(spec: ModelSpec) -> None:
    """llama.cpp's architectures of experts have them in every layer, and weigh them in one way each."""
    if spec.experts is None:
        return
    arch, dense = spec.gguf.arch, [index for index, layer in enumerate(spec.layers) if not layer.sparse]
    if dense:
        raise ExportError(
            f"{spec.name}: in llama.cpp a {arch!r} model has experts in every layer, and this one has a single MLP in "
            f"layer {dense[0]}. Such a GGUF file would not load."
        )
    if spec.experts.normalize != spec.gguf.normalizes_experts:
        does, wants = ("scales", "are not") if spec.gguf.normalizes_experts else ("does not scale", "are")
        raise ExportError(
            f"{spec.name}: in a {arch!r} model llama.cpp {does} the weights of a token's experts to a sum of 1, and in "
            f"this one they {wants} scaled. A GGUF file of it would give other answers."
        )


def _vocab_metadata(vocab: GGUFVocab, chat_template: str | None) -> dict[str, Value]:
    values = {
        "model": Value("string", vocab.model),
        "pre": Value("string", vocab.pre),
        "tokens": Value("string[]", vocab.tokens),
        "token_type": Value("i32[]", vocab.token_types),
        "add_bos_token": Value("bool", vocab.add_bos),
        "add_eos_token": Value("bool", vocab.add_eos),
        "add_space_prefix": Value("bool", vocab.add_space_prefix),
    }
    if vocab.scores is not None:
        values["scores"] = Value("f32[]", vocab.scores)
    if vocab.merges is not None:
        values["merges"] = Value("string[]", vocab.merges)
    ids = {
        "bos": vocab.bos_id,
        "eos": vocab.eos_id,
        "unknown": vocab.unk_id,
        "padding": vocab.pad_id,
        "eot": vocab.eot_id,
    }
    values |= {f"{word}_token_id": Value("u32", token) for word, token in ids.items() if token is not None}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    if chat_template is not None:
        metadata["tokenizer.chat_template"] = Value("string", chat_template)
    return metadata


# --- reading back ----------------------------------------------------------------------------------------------------


def _check(path: Path, planned: _PlannedFile) -> None:
    """Holds the file on disk against its plan; ExportError names the first difference."""
    file = read_gguf(path)
    found = {key: value.pack() for key, value in file.metadata.items()}
    wanted = {key: value.pack() for key, value in planned.metadata.items()}
    if found != wanted:
        key = min(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
        values = (str(metadata.get(key))[:200] for metadata in (planned.metadata, file.metadata))
        raise ExportError("{}: metadata {!r} wants {}, found {}.".format(path, key, *values))
    listed = {name: (info.shape, info.codec.name) for name, info in file.tensors.items()}
    for tensor in planned.tensors:
        if listed.pop(tensor.name, None) != (tensor.shape, tensor.type):
            raise ExportError(f"{path}: {tensor.name!r} as {tensor.type} {tensor.shape} was wanted, and is not there.")
        _check_values(file, tensor)
    if listed:
        raise ExportError(f"{path}: holds tensors that the model does not have: {', '.join(sorted(listed))}.")


def _check_values(file: GGUFFile, tensor: _PlannedTensor) -> None:
    codec = CODECS[tensor.type]
    first = 0
    for rows in tensor.row_chunks():
        wanted = rows.float()
        bound = torch.zeros_like(wanted) if rows.dtype in codec.exact_for else codec.error_bound(wanted)
        error = (file.read_rows(tensor.name, first, len(rows)) - wanted).abs()
        if not (error <= bound).all():  # a NaN is not within a bound either
            row = first + int((error <= bound).all(dim=1).int().argmin())
            raise ExportError(
                f"{file.path}: {tensor.name} differs from its source in row {row} by more than {tensor.type} rounds. "
                f"Is the disk sound, or did the model folder change meanwhile?"
            )
        first += len(rows)
