"""The text half of a vision model's checkpoint: which part of `config.json` and of the tensors belongs to it.

A vision model's `config.json` nests the settings of its language model under `text_config`, and its tensors carry a
prefix that depends on the writer:

    model.layers.0.mlp.up_proj.weight                   a text model's own checkpoint
    language_model.model.layers.0.mlp.up_proj.weight    as the hub stores vision models
    model.language_model.layers.0.mlp.up_proj.weight    as transformers 5 calls them in memory

A page with a section `[text_half]` says which architectures hold its family so, and how the prefixes are spelt. Above
this module everything speaks of the text model alone.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from lumen.errors import CheckpointError, SpecError

# What the whole model's config.json says for its text half too. Where both say something, readers go by the whole's.
SHARED_KEYS = ("tie_word_embeddings", "quantization_config", "architectures")
FALLBACK_KEYS = ("torch_dtype", "dtype", "bos_token_id", "eos_token_id", "pad_token_id")

MROPE = " Its text half turns by positions of three parts (mrope), which lumen does not know."
REFUSED = {"Qwen2VLForConditionalGeneration": MROPE, "Qwen2_5_VLForConditionalGeneration": MROPE}  # why no page has it


@dataclass(frozen=True, kw_only=True)
class TextHalfPage:
    architectures: list[str]  # of vision checkpoints that hold this family
    names: dict[str, list[str]]  # prefix of this page's checkpoint names → its spellings there
    aside: list[str]  # prefixes of the tensors that are no part of the text half
    defaults: dict[str, str | int | float | bool] = field(default_factory=dict)  # what text_config may leave out


def text_config(config: dict, where: str) -> dict:
    """The settings of the text half where `config` nests them under `text_config`; else `config` itself.

    `architectures` stays that of the whole checkpoint, so that the page can be found by it.
    """
    if "text_config" not in config:
        return config
    if not isinstance(config["text_config"], dict):
        raise SpecError(f"{where}: text_config wants an object, found {config['text_config']!r}.")
    text = dict(config["text_config"])
    text |= {key: config[key] for key in SHARED_KEYS if config.get(key) is not None}
    if "torch_dtype" in text or "dtype" in text:  # one key in two spellings
        config = {key: value for key, value in config.items() if key not in ("torch_dtype", "dtype")}
    text |= {key: config[key] for key in FALLBACK_KEYS if text.get(key) is None and config.get(key) is not None}
    return text


def own_names(stored: Iterable[str], half: TextHalfPage, where: str) -> tuple[dict[str, str], list[str]]:
    """The text model's name → the stored one, for the tensors of the text half; and the stored names left aside.

    A name that is of neither kind stays as it is: whoever checks the names will find that it has no place.
    """
    names: dict[str, str] = {}
    aside: list[str] = []
    for name in stored:
        if any(name.startswith(prefix + ".") for prefix in half.aside):
            aside.append(name)
            continue
        own = _own_name(name, half)
        if own in names:
            raise CheckpointError(f"{where}: {names[own]!r} and {name!r} are both {own!r}. Remove one.")
        names[own] = name
    return names, aside


def _own_name(name: str, half: TextHalfPage) -> str:
    for own, spellings in half.names.items():
        for spelling in spellings:
            if name.startswith(spelling + "."):
                return own + name.removeprefix(spelling)
    return name
