"""Checkpoints that bitsandbytes has quantized: which of them are read, and how one weight lies in their tensors.

For a weight of shape (out, in), n values in all:

    NAME.weight                                uint8 (ceil(n / 2), 1), the codes; another dtype may hold the same bytes
    NAME.weight.absmax                         uint8 (ceil(n / 64),), codes of the scales
    NAME.weight.quant_map                      fp32 (16,), what a code stands for
    NAME.weight.nested_absmax                  fp32 (ceil(n / 64 / 256),)
    NAME.weight.nested_quant_map               fp32 (256,), what a code of a scale stands for
    NAME.weight.quant_state.bitsandbytes__nf4  uint8, JSON: shape, dtype, block sizes, the mean scale `nested_offset`

Without double quantization `absmax` is the fp32 scales, and nothing nested is there. A layer that was left in 16 bits
has its weight alone. What is stored becomes an `ops/nf4.NF4` and back without a changed bit.

Decision: the tables in the file must be ours · because a table is the meaning of every code, and one that differs is
another format or damage · revisit when bitsandbytes changes one. The table of the scales may differ in its last bits,
as it is computed by whoever writes; its scales are then unpacked with it and kept in fp32.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lumen import schema
from lumen.errors import CheckpointError
from lumen.formats.safetensors import TensorFiles
from lumen.ops.nf4 import BLOCK, NESTED_BLOCK, NF4, NF4_VALUES, nested_values

STATE = ".quant_state.bitsandbytes__nf4"
SIDES = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", STATE)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KINDS = {  # quant_method in config.json → what its readers call it
    "gptq": "GPTQ",
    "awq": "AWQ",
    "fp8": "FP8",
    "fbgemm_fp8": "FP8 (fbgemm)",
    "mxfp4": "MXFP4",
    "hqq": "HQQ",
    "bitnet": "BitNet",
}


# Which checkpoints are read ------------------------------------------------------------------------------------------


def check_quantization(config: dict, where: str) -> bool:
    """Whether `config` announces NF4 weights of bitsandbytes.

    CheckpointError for any other `quantization_config`: it names the kind, and what to load instead.
    """
    found = config.get("quantization_config") or config.get("compression_config")
    if found is None:
        return False
    if not isinstance(found, dict):
        raise CheckpointError(f"{where}: quantization_config wants an object, found {found!r}.")
    if (kind := _kind(found)) != "NF4":
        raise CheckpointError(
            f"{where}: wanted 16-bit weights or bitsandbytes' NF4, found a checkpoint quantized as {kind}. Load the "
            "original in 16 bits instead (model.nf4=true packs it into 4 bits as it loads), or its bnb-4bit version."
        )
    return True


def _kind(found: dict) -> str:
    """What a `quantization_config` describes, as "NF4", "GPTQ" or "int8 (bitsandbytes)"."""
    method = found.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in found else "an unnamed kind")
    if method != "bitsandbytes":
        details = [str(found[key]) for key in ("format", "fmt") if found.get(key)]
        details += [f"{found['bits']} bits"] if found.get("bits") else []
        return KINDS.get(method, str(method)) + (f" ({', '.join(details)})" if details else "")
    if found.get("load_in_8bit") or not found.get("load_in_4bit"):
        return "int8 (bitsandbytes)"
    data_type = str(found.get("bnb_4bit_quant_type", "fp4"))  # what bitsandbytes takes where nothing is said
    return "NF4" if data_type == "nf4" else f"{data_type} (bitsandbytes)"


def packed_weights(names: Iterable[str]) -> dict[str, list[str]]:
    """Weight → the tensors beside it that belong to it, for each NF4 weight among the `names` of a file."""
    known = set(names)
    weights = [name.removesuffix(STATE) for name in known if name.endswith(STATE)]
    return {weight: [weight + side for side in SIDES if weight + side in known] for weight in sorted(weights)}


# Reading -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class State:
    """The JSON beside an NF4 weight."""

    quant_type: str
    blocksize: int
    dtype: str
    shape: list[int]
    nested_blocksize: int | None = None
    nested_dtype: str | None = None
    nested_offset: float | None = None


def read_state(files: TensorFiles, weight: str) -> State:
    """What is written of an NF4 weight, checked; CheckpointError where it cannot be an NF4 weight of ours."""
    where = f"{files.file_of(weight + STATE)}: {weight + STATE!r}"
    try:
        found = json.loads(bytes(_read(files, weight + STATE, torch.uint8).tolist()))
    except (ValueError, RecursionError) as error:  # a UnicodeDecodeError is a ValueError
        raise CheckpointError(f"{where}: wanted JSON, found: {error}. Download the file again.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{where}: wanted a JSON object, found {type(found).__name__}. Is the file damaged?")
    state = schema.read(State, found, where, CheckpointError)
    wanted = {"quant_type": ("nf4",), "blocksize": (BLOCK,), "dtype": tuple(DTYPES)}
    if state.nested_offset is not None:
        wanted |= {"nested_blocksize": (NESTED_BLOCK,), "nested_dtype": ("float32",)}
        if not math.isfinite(state.nested_offset):
            raise CheckpointError(f"{where}: nested_offset wants a finite number, found {state.nested_offset}.")
    for key, allowed in wanted.items():
        if (value := getattr(state, key)) not in allowed:
            raise CheckpointError(
                f"{where}: {key} wants {' or '.join(map(repr, allowed))}, found {value!r}. Load the checkpoint in 16 "
                "bits instead; model.nf4=true packs it."
            )
    if not state.shape or min(state.shape) < 1:
        raise CheckpointError(f"{where}: shape wants positive sizes, found {state.shape}. Is the file damaged?")
    return state


def read_nf4(files: TensorFiles, weight: str, state: State) -> NF4:
    """The NF4 weight as it is stored, its memory being the file's own; CheckpointError for parts that do not fit."""
    values = math.prod(state.shape)
    blocks = -(-values // BLOCK)
    codes = _read(files, weight, None).view(torch.uint8).flatten()
    _check_size(files, weight, codes, -(-values // 2))
    _check_table(files, weight + ".quant_map", torch.tensor(NF4_VALUES), tolerance=0.0)
    nested = state.nested_offset is not None
    absmax = _read(files, weight + ".absmax", torch.uint8 if nested else torch.float32).flatten()
    _check_size(files, weight + ".absmax", absmax, blocks)
    shape, dtype = tuple(state.shape), DTYPES[state.dtype]
    if not nested:
        _check_finite(files, weight + ".absmax", absmax)
        return NF4(codes, absmax, None, None, shape, dtype)
    nested_absmax = _read(files, weight + ".nested_absmax", torch.float32).flatten()
    _check_size(files, weight + ".nested_absmax", nested_absmax, -(-blocks // NESTED_BLOCK))
    _check_finite(files, weight + ".nested_absmax", nested_absmax)
    offset = torch.tensor(state.nested_offset, dtype=torch.float32)
    table = _check_table(files, weight + ".nested_quant_map", nested_values(), tolerance=1e-6)  # some last bits
    if torch.equal(table, nested_values()):
        return NF4(codes, absmax, nested_absmax, offset, shape, dtype)
    scales = table[absmax.long()] * nested_absmax.repeat_interleave(NESTED_BLOCK)[:blocks] + offset
    return NF4(codes, scales, None, None, shape, dtype)


def _read(files: TensorFiles, name: str, dtype: torch.dtype | None) -> Tensor:
    tensor = files.read(name)
    if dtype is not None and tensor.dtype != dtype:
        raise CheckpointError(f"{files.file_of(name)}: {name!r} wants {dtype}, found {tensor.dtype}.")
    return tensor


def _check_size(files: TensorFiles, name: str, found: Tensor, wanted: int) -> None:
    if found.numel() != wanted:
        raise CheckpointError(
            f"{files.file_of(name)}: {name!r} wants {wanted:,} values for the shape beside it, found "
            f"{found.numel():,}. Download the file again."
        )


def _check_finite(files: TensorFiles, name: str, found: Tensor) -> None:
    if not found.isfinite().all():
        raise CheckpointError(f"{files.file_of(name)}: {name!r} wants finite scales, found infinity or NaN.")


def _check_table(files: TensorFiles, name: str, wanted: Tensor, tolerance: float) -> Tensor:
    """The stored table, where each value is `wanted` to a relative `tolerance`."""
    found = _read(files, name, torch.float32)
    if found.shape != wanted.shape or not bool(((found - wanted).abs() <= tolerance * wanted.abs()).all()):
        raise CheckpointError(
            f"{files.file_of(name)}: {name!r} is not the table of NF4 with which lumen computes, so the codes mean "
            "something else. Load the checkpoint in 16 bits instead; model.nf4=true packs it."
        )
    return found


# Writing -------------------------------------------------------------------------------------------------------------


def stored_tensors(weight: str, nf4: NF4) -> dict[str, Tensor]:
    """The tensors that hold an NF4 weight called `weight` in a file, as bitsandbytes 0.50 writes them."""
    word = next(word for word, dtype in DTYPES.items() if dtype == nf4.dtype)
    state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": word, "shape": list(nf4.shape)}
    tensors = {weight: nf4.codes[:, None], weight + ".absmax": nf4.absmax}
    tensors[weight + ".quant_map"] = torch.tensor(NF4_VALUES)
    if nf4.nested_absmax is not None:
        tensors |= {weight + ".nested_absmax": nf4.nested_absmax, weight + ".nested_quant_map": nested_values()}
        state |= {
            "nested_blocksize": NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": nf4.offset.item(),
        }
    tensors[weight + STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return tensors


def quantization_config(left_dense: list[str], dtype: torch.dtype) -> dict:
    """The `quantization_config` of a checkpoint in this layout.

    left_dense  checkpoint names of the linear layers that are not packed
    dtype       that readers compute in
    """
    word = next(word for word, known in DTYPES.items() if known == dtype)
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": word,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": left_dense,
        "llm_int8_threshold": 6.0,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
    }
