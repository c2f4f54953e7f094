"""`config.json` of a model folder, read into one spelling."""

from pathlib import Path

from lumen.errors import SpecError
from lumen.formats.json_object import read_object
from lumen.text_half import text_config

LAYER_TYPES = {"full": "full_attention", "window": "sliding_attention"}  # what config.json calls our kinds of layer


def read_config(folder: Path | str) -> dict:
    """`config.json` of a model folder, in the hub's classic spelling.

    Newer writers put `rope_theta` and the scaling into `rope_parameters` and call `torch_dtype` `dtype`; both spellings
    come out as `rope_theta`, `rope_scaling` (always there, with `rope_type`; "default" means none) and `torch_dtype`.
    Where each kind of layer has parameters of its own, those of the window layers come out as `rope_local_base_freq`.
    """
    path = Path(folder) / "config.json"
    config = read_object(path, SpecError, "A model is a folder with config.json, safetensors and a tokenizer.")
    return _classic_spelling(text_config(config, str(path)), str(path))


def _classic_spelling(config: dict, where: str) -> dict:
    config = dict(config)
    if "dtype" in config:
        config.setdefault("torch_dtype", config.pop("dtype"))
    scaling = config.get("rope_scaling") or {}
    if parameters := config.pop("rope_parameters", None):
        _object(parameters, "rope_parameters", where)
        scaling = dict(parameters)
        if windowed := scaling.pop(LAYER_TYPES["window"], None):
            config["rope_local_base_freq"] = _plain_theta(windowed, where)
        full = scaling.pop(LAYER_TYPES["full"], scaling)
        scaling = dict(_object(full, f"rope_parameters.{LAYER_TYPES['full']}", where))
        config["rope_theta"] = scaling.pop("rope_theta", config.get("rope_theta"))
    _object(scaling, "rope_scaling", where)
    scaling = dict(scaling)
    if (share := scaling.pop("partial_rotary_factor", None)) is not None:  # it counts beside "default", too
        config["partial_rotary_factor"] = share
    scaling["rope_type"] = scaling.pop("type", None) or scaling.get("rope_type") or "default"
    if scaling["rope_type"] == "su":  # what Phi-3 first called it
        scaling["rope_type"] = "longrope"
    # what stands beside "default" does not count, as in transformers
    config["rope_scaling"] = {"rope_type": "default"} if scaling["rope_type"] == "default" else scaling
    return config


def _plain_theta(parameters: dict, where: str) -> float | None:
    """`rope_theta` of the window layers, whose positions no known family scales."""
    _object(parameters, f"rope_parameters.{LAYER_TYPES['window']}", where)
    if (kind := parameters.get("rope_type", "default")) != "default":
        raise SpecError(
            f"{where}: rope_parameters.{LAYER_TYPES['window']}.rope_type is {kind!r}; only 'default' is known there."
        )
    return parameters.get("rope_theta")


def _object(found: object, key: str, where: str) -> dict:
    if not isinstance(found, dict):
        raise SpecError(f"{where}: {key} wants an object, found {found!r}.")
    return found
