"""A folder of safetensors becomes a model, one tensor at a time, quantized as it comes; and a model becomes such a
folder.

Peak memory while loading is the model as it will be plus one tensor: each is mapped from disk, moved, packed where
asked, and forgotten.
"""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from lumen.errors import CheckpointError, ConfigError, SpecError, closest
from lumen.formats.atomic import write_json
from lumen.formats.safetensors import TensorEntry, TensorFiles, write_sharded
from lumen.models.decoder import Decoder
from lumen.nn.linear import Linear
from lumen.spec import ModelSpec, TensorName, load_family

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(folder: Path | str, *, dtype: str = "auto", nf4: bool = False, device: str = "auto") -> Decoder:
    """The model in `folder`, frozen and in eval mode.

    dtype   of the activations and the dense weights: float32, bfloat16, float16, or auto (see `choose_dtype`)
    nf4     pack the linear layers of every block into 4 bits; embedding, head and norms stay dense
    device  auto takes a GPU when there is one

    SpecError when no page describes `config.json`; CheckpointError for missing, extra or mis-shaped tensors.
    """
    place = choose_device(device)
    spec, files = open_checkpoint(folder)
    with torch.device("meta"):
        model = Decoder(spec, choose_dtype(dtype, place))
    with files:
        for name in spec.tensors():
            _place(model, name, files.read(name.checkpoint), nf4, place)
    return model.eval()


def open_checkpoint(folder: Path | str) -> tuple[ModelSpec, TensorFiles]:
    """The spec of a model folder and its open files, checked to hold the tensors that the spec wants and no others."""
    folder = Path(folder)
    spec, files = load_family(folder), TensorFiles(folder)
    _check_names(spec, files, folder)
    for name in spec.tensors():
        _check_tensor(spec, files, name)
    return spec, files


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
        _place(model, name, values, False, place)
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

    def read(name: TensorName) -> Tensor:
        values = state[name.role].to("cpu", dtype)
        if not values.isfinite().all():
            raise CheckpointError(f"{name.checkpoint}: wanted finite weights in {dtype}, found infinity or NaN.")
        return values

    entries = [TensorEntry(name.checkpoint, name.shape, dtype, partial(read, name)) for name in spec.tensors()]
    write_sharded(folder, entries)
    config = dict(spec.config)
    if config["rope_scaling"]["rope_type"] == "default":
        config["rope_scaling"] = None
    write_json(folder / "config.json", config)


def stored_dtype(spec: ModelSpec) -> torch.dtype:
    """The dtype that `config.json` says the weights are stored in; SpecError for one that lumen does not write."""
    word = spec.config.get("torch_dtype") or "float32"
    if word not in DTYPES:
        raise SpecError(f"config.json: torch_dtype is {word!r}; to save such a model lumen wants {', '.join(DTYPES)}.")
    return DTYPES[word]


def linear_layers(model: nn.Module) -> dict[str, Linear]:
    """Role → layer, for the linear layers of the blocks: those that are quantized and adapted."""
    return {
        role: layer for role, layer in model.named_modules() if isinstance(layer, Linear) and role.startswith("blocks.")
    }


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
    """`auto` is bfloat16 on a GPU that computes in it, else float32: few CPUs have fast bfloat16."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    if name not in DTYPES:
        raise ConfigError(f"model.dtype is {name!r}; known: auto, {', '.join(DTYPES)}.{closest(name, DTYPES)}")
    return DTYPES[name]


def _check_names(spec: ModelSpec, files: TensorFiles, folder: Path) -> None:
    wanted = {name.checkpoint for name in spec.tensors()}
    found = set(files.names())
    if missing := sorted(wanted - found):
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(wanted)} tensors are missing, the first is {missing[0]!r}."
            f"{closest(missing[0], found)} Is {spec.name!r} the right family for this folder?"
        )
    extra = sorted(name for name in found - wanted if not _may_be_extra(spec, files, name))
    if extra:
        raise CheckpointError(
            f"{folder}: {len(extra)} tensors have no place in a {spec.name!r} model, the first is {extra[0]!r} in "
            f"{files.file_of(extra[0]).name}. Is config.json that of these weights?"
        )


def _may_be_extra(spec: ModelSpec, files: TensorFiles, name: str) -> bool:
    """Older writers stored the rotary frequencies, and a tied head beside its embedding."""
    if name.endswith("rotary_emb.inv_freq"):
        return True
    if not spec.tied or name != f"{spec.names.by_role('head').checkpoint}.weight":
        return False
    embed = spec.names.by_role("embed").checkpoint + ".weight"
    return files.shape(name) == files.shape(embed) and torch.equal(files.read(name), files.read(embed))


def _check_tensor(spec: ModelSpec, files: TensorFiles, name: TensorName) -> None:
    where = f"{files.file_of(name.checkpoint)}: {name.checkpoint!r}"
    if (shape := files.shape(name.checkpoint)) != name.shape:
        raise CheckpointError(
            f"{where} wants shape {name.shape}, found {shape}. Is {spec.name!r} the right family for this folder?"
        )
    if not (dtype := files.dtype(name.checkpoint)).is_floating_point:
        raise CheckpointError(f"{where} wants floats, found {dtype}.")


def _place(model: Decoder, name: TensorName, values: Tensor, nf4: bool, device: torch.device) -> None:
    role, _, kind = name.role.rpartition(".")
    module = model.get_submodule(role)
    if nf4 and kind == "weight" and isinstance(module, Linear) and role.startswith("blocks."):
        module.quantize(values.to(device))  # from the file's own values, before any rounding to the compute dtype
        return
    setattr(module, kind, nn.Parameter(values.to(device, model.dtype), requires_grad=False))
