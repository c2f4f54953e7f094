"""A folder of safetensors becomes a model, one tensor at a time, quantized as it comes; and a model becomes such a
folder.

Peak memory while loading is the model as it will be plus one tensor: each is mapped from disk, moved, packed where
asked, and forgotten. On the way to a GPU the next few are there already, see `staging.py`.

What one would not expect of a folder (its vision half is left aside, some layers stay in 16 bits) is said by the logger
`lumen`, whose warnings Python prints to stderr unless a program sends them elsewhere.
"""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from lumen.errors import CheckpointError, ConfigError, SpecError, closest
from lumen.formats.atomic import write_json
from lumen.formats.safetensors import TensorEntry, write_sharded
from lumen.mismatch import extra_names, missing_names, wrong_shape
from lumen.models.decoder import Decoder
from lumen.names import FileTensor, Part, TensorName, checkpoint_tensors
from lumen.nn.attention import Attention
from lumen.nn.experts import ExpertLinear
from lumen.nn.layers import MLP
from lumen.nn.linear import Linear, round_to_fp8
from lumen.ops.fp8 import MULTIPLE, refusal
from lumen.ops.nf4 import NF4, dequantize_nf4, quantize_nf4
from lumen.spec import ModelSpec, load_family
from lumen.staging import carry, go_on
from lumen.weights import Weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LOG = logging.getLogger("lumen")


def load_model(
    folder: Path | str,
    *,
    dtype: str = "auto",
    nf4: bool = False,
    fp8: bool = False,
    device: str = "auto",
    proceed: Callable[[], None] = go_on,
) -> Decoder:
    """The model in `folder`, frozen and in eval mode.

    dtype    of the activations and the dense weights: float32, bfloat16, float16, or auto (see `choose_dtype`)
    nf4      pack the linear layers of every block into 4 bits; embedding, head and norms stay dense. A checkpoint that
             comes in NF4 keeps its own blocks, and what it left in 16 bits; without `nf4` it is dequantized
    fp8      while the model trains, multiply by the linear layers of every block in 8 bits (`ops/fp8.py`)
    device   auto takes a GPU when there is one
    proceed  called before anything is put onto the device, then for each tensor, for each few MB on the way to a GPU,
             and for each group of layers that `fp8` rounds; what it raises ends the loading

    SpecError when no page describes `config.json`; CheckpointError for missing, extra or mis-shaped tensors, and for
    NaN or infinity in what is packed; ConfigError for a device that is not there, or has no products in 8 bits.
    """
    place = choose_device(device)
    if fp8 and (complaint := refusal(place)):
        raise ConfigError(f"model.fp8 {complaint}. Leave it out: products are in 16 bits then.")
    spec, files = open_checkpoint(folder)
    with torch.device("meta"):
        model = Decoder(spec, choose_dtype(dtype, place))
    packing = nf4 and not files.prequantized
    places = [(name, part) for name in spec.tensors() for part in name.parts]  # of a stack one slice after the other
    offsets: dict[Part, Tensor] = {}  # mean scales of what is packed here
    proceed()
    with files:
        stored = (read_stored(files, part) for _, part in places)
        for (name, part), weight in zip(places, carry(stored, place, proceed), strict=True):
            proceed()
            if isinstance(weight, NF4):
                if nf4 and _place_packed(model, name, part, weight):
                    continue
                weight = dequantize_nf4(weight, torch.float32)
            if packing and _is_packed(model, name):
                # from the file's own values, before any rounding to the compute dtype
                packed = quantize_nf4(weight.to(place), check=False)
                _place_packed(model, name, part, packed)
                offsets[part] = packed.offset
            else:
                _place(model, name, part, weight, place)
        _refuse_damaged(offsets, files)
    if fp8:
        _round_blocks(model, folder, proceed)
    return model.eval()


def open_checkpoint(folder: Path | str, *, announce: bool = True) -> tuple[ModelSpec, Weights]:
    """The spec of a model folder and its open files, checked to hold the tensors that the spec wants and no others.

    announce  say what one would not expect of the folder
    """
    folder = Path(folder)
    spec = load_family(folder)
    files = Weights(folder, spec)
    _check_names(spec, files, folder)
    for tensor in checkpoint_tensors(spec.tensors()):
        _check_tensor(spec, files, tensor)
    if announce:
        _say_what_is_unexpected(spec, files, folder)
    return spec, files


def read_stored(files: Weights, part: Part) -> Tensor | NF4:
    """One part of a role as it is stored: a view of the file's own pages, or NF4 blocks that are such views."""
    packed = read_packed(files, part)
    return read_part(files, part) if packed is None else packed


def read_packed(files: Weights, part: Part) -> NF4 | None:
    """The blocks of one part of a role that is stored in NF4, to the bit; None for what is stored dense."""
    whole = files.packed(part.name)
    return whole if whole is None or whole.shape[0] == part.rows else whole.rows(part.first, part.rows)


def read_tensor(files: Weights, name: TensorName) -> Tensor:
    """The values of one role, in the dtype of the file: a view of the file's own pages, or a stack of its parts."""
    parts = [read_part(files, part) for part in name.parts]
    return parts[0] if name.parts[0].index is None else torch.stack(parts)


def read_part(files: Weights, part: Part) -> Tensor:
    """The values of one part of a role, a view of the file's own pages or an NF4 weight dequantized."""
    return files.read(part.name)[part.first : part.first + part.rows]


def join_pieces(tensor: FileTensor, read: Callable[[TensorName, Part], Tensor]) -> Tensor:
    """The values of one tensor of a file, given those of its pieces: of a role, or of one slice of a stack."""
    pieces = [read(name, part) for name, part in tensor.pieces]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def new_model(spec: ModelSpec, *, seed: int, device: str = "auto") -> Decoder:
    """A model of random fp32 weights: norms at the identity, all else normal with the config's `initializer_range`."""
    place = choose_device(device)
    with torch.device("meta"):
        model = Decoder(spec)
    random = torch.Generator("cpu").manual_seed(seed)
    std = spec.config.get("initializer_range", 0.02)
    for name in spec.tensors():
        if len(name.shape) > 1:
            values = torch.empty(name.shape).normal_(0.0, std, generator=random)
        else:
            one = name.role.endswith("norm.weight") and spec.norm == "rms"
            values = torch.full(name.shape, 1.0 if one else 0.0)
        for part in name.parts:
            _place(model, name, part, _slice(values, part), place)
    return model.eval()


def save_model(model: Decoder, folder: Path | str) -> None:
    """Writes weights and `config.json` of a dense model into an existing folder, in the dtype that its config names.

    The tokenizer's files are the caller's to add (`Tokenizer.save`). CheckpointError for a model that holds NF4 layers,
    whose exact weights are elsewhere.
    """
    spec, folder = model.spec, Path(folder)
    if any(layer.nf4 is not None for layer in linear_layers(model).values()):
        raise CheckpointError(
            "A model with NF4 layers cannot be saved dense: merge its adapter into the original base."
        )
    dtype, state = stored_dtype(spec), model.state_dict()

    def read(tensor: FileTensor) -> Tensor:
        values = join_pieces(tensor, lambda name, part: _slice(state[name.role], part)).to("cpu", dtype)
        if not values.isfinite().all():
            raise CheckpointError(f"{tensor.name}: wanted finite weights in {dtype}, found infinity or NaN.")
        return values

    tensors = checkpoint_tensors(spec.tensors())
    entries = [TensorEntry(tensor.name, tensor.shape, dtype, partial(read, tensor)) for tensor in tensors]
    write_sharded(folder, entries)
    write_json(folder / "config.json", dense_config(spec))


def dense_config(spec: ModelSpec) -> dict:
    """`config.json` for the text model alone, its weights stored dense."""
    config = {key: value for key, value in spec.config.items() if key not in ("quantization_config", "text_config")}
    if config["rope_scaling"]["rope_type"] == "default":
        config["rope_scaling"] = None
    return config


def stored_dtype(spec: ModelSpec) -> torch.dtype:
    """The dtype that `config.json` says the weights are stored in; SpecError for one that lumen does not write."""
    word = spec.config.get("torch_dtype") or "float32"
    if word not in DTYPES:
        raise SpecError(f"config.json: torch_dtype is {word!r}; to save such a model lumen wants {', '.join(DTYPES)}.")
    return DTYPES[word]


def linear_layers(model: nn.Module) -> dict[str, Linear | ExpertLinear]:
    """Role → layer, for the linear layers of the blocks: those that are quantized and adapted."""
    linear, modules = (Linear, ExpertLinear), model.named_modules()
    return {role: layer for role, layer in modules if isinstance(layer, linear) and role.startswith("blocks.")}


def linear_names(spec: ModelSpec, *, experts: bool = True) -> list[str]:
    """What a checkpoint calls the weights of the blocks' linear layers, fused ones once, experts one by one or not."""
    linear = [name for name in spec.tensors() if name.role.startswith("blocks.") and not name.exact]
    parts = [part for name in linear for part in name.parts if len(name.part_shape(part)) == 2]
    return list(dict.fromkeys(part.name for part in parts if experts or part.index is None))


def choose_device(name: str) -> torch.device:
    """`auto` is a CUDA device when there is one; a GPU that was asked for and is not there is a ConfigError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"model.device is {name!r}, but PyTorch {torch.__version__} finds no GPU here. Say auto or cpu."
        )
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU that computes in it, else float32.

    Few CPUs have fast bfloat16. A GPU of before 2020 only imitates it; float16 would be fast there, but its gradients
    vanish without loss scaling and some families overflow in it, so it is for whoever asks for it by name.
    """
    if name == "auto":
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float32
    if name not in DTYPES:
        raise ConfigError(f"model.dtype is {name!r}; known: auto, {', '.join(DTYPES)}.{closest(name, DTYPES)}")
    return DTYPES[name]


def _check_names(spec: ModelSpec, files: Weights, folder: Path) -> None:
    wanted = {tensor.name for tensor in checkpoint_tensors(spec.tensors())}
    found = set(files.names())
    if missing := sorted(wanted - found):
        raise CheckpointError(missing_names(spec, missing, len(wanted), found, folder))
    extra = sorted(name for name in found - wanted if not _may_be_extra(spec, files, name))
    if extra:
        raise CheckpointError(extra_names(spec, extra, files.file_of(extra[0])))


def _may_be_extra(spec: ModelSpec, files: Weights, name: str) -> bool:
    """Older writers stored the rotary frequencies, and a tied head beside its embedding."""
    if name.endswith("rotary_emb.inv_freq"):
        return True
    if not spec.tied or name != f"{spec.names.by_role('head').checkpoint}.weight":
        return False
    embed = spec.names.by_role("embed").checkpoint + ".weight"
    return files.shape(name) == files.shape(embed) and torch.equal(files.read(name), files.read(embed))


def _check_tensor(spec: ModelSpec, files: Weights, tensor: FileTensor) -> None:
    file = files.file_of(tensor.name)
    if not (dtype := files.dtype(tensor.name)).is_floating_point:
        raise CheckpointError(f"{file}: {tensor.name!r} wants floats, found {dtype}. Is the checkpoint quantized?")
    if (shape := files.shape(tensor.name)) != tensor.shape:
        raise CheckpointError(wrong_shape(spec, tensor, shape, file))


def _say_what_is_unexpected(spec: ModelSpec, files: Weights, folder: Path) -> None:
    if spec.text_half is not None:
        LOG.warning("%s: the text half of a vision model; %d vision tensors are left aside.", folder, len(files.aside))
    if not files.prequantized:
        return
    dense = set(linear_names(spec)) - files.packed_names
    LOG.warning(
        "%s: %d weights are NF4 already and used as they are; %d linear weights of the blocks are stored dense.",
        folder,
        len(files.packed_names),
        len(dense),
    )


def _round_blocks(model: Decoder, folder: Path | str, proceed: Callable[[], None]) -> None:
    """Gives the linear layers of the blocks their weights in 8 bits beside the exact ones; says where some stay."""
    groups, layers = [], linear_layers(model)
    for module in model.blocks.modules():
        if isinstance(module, Attention):
            groups += [(module.q, module.k, module.v), (module.o,)]
        elif isinstance(module, MLP):
            groups += [(module.gate, module.up), (module.down,)]
    rounded = 0
    for group in groups:
        proceed()
        rounded += len(group) if round_to_fp8(group) else 0
    if rounded < len(layers):
        LOG.warning(
            "%s: model.fp8 serves %d of the blocks' %d linear layers; experts, and layers that share their input with "
            "one whose sizes are no multiples of %d, stay as they are.",
            folder,
            rounded,
            len(layers),
            MULTIPLE,
        )


def _slice(values: Tensor, part: Part) -> Tensor:
    """What of a role's values a part holds."""
    return values if part.index is None else values[part.index]


def _is_packed(model: Decoder, name: TensorName) -> bool:
    """Whether a role is the weight of a linear layer of a block: those are what NF4 packs."""
    role, _, kind = name.role.rpartition(".")
    module = model.get_submodule(role)
    linear = kind == "weight" and isinstance(module, Linear) and role.startswith("blocks.")
    return linear or isinstance(module, ExpertLinear)


def _place_packed(model: Decoder, name: TensorName, part: Part, stored: NF4) -> bool:
    """Puts blocks into their layer as they are; False for what is no linear layer of a block, and stays dense."""
    module = model.get_submodule(name.role.removesuffix(".weight"))
    if isinstance(module, ExpertLinear):
        module.place_packed(part.index, stored)
        return True
    if not isinstance(module, Linear) or not name.role.startswith("blocks."):
        return False
    module.nf4, module.weight = stored, None
    return True


def _refuse_damaged(offsets: dict[Part, Tensor], files: Weights) -> None:
    """CheckpointError for the first weight that held NaN or infinity: its mean scale is no number. All are looked at
    together, for looking waits for the GPU."""
    values = list(offsets.values())
    if not values or values[0].is_meta:
        return
    for part, sound in zip(offsets, torch.stack(values).isfinite().tolist(), strict=True):
        if not sound:
            raise CheckpointError(
                f"{files.file_of(part.name)}: {part.name!r}: NF4 wants finite values, found NaN or infinity in "
                f"{tuple(files.shape(part.name))}. Is the file damaged?"
            )


def _place(model: Decoder, name: TensorName, part: Part, values: Tensor, device: torch.device) -> None:
    role, _, kind = name.role.rpartition(".")
    module = model.get_submodule(role)
    dtype = torch.float32 if name.exact else model.dtype
    if isinstance(module, ExpertLinear):
        module.place(part.index, values.to(device), dtype)
        return
    setattr(module, kind, nn.Parameter(values.to(device, dtype), requires_grad=False))
