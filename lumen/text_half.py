"""The text half of a vision model's checkpoint: which part of `config.json` and of the tensors belongs to it.

A vision model's `config.json` nests the settings of its language model under `text_config`, and its tensors carry a
prefix that depends on the writer:

    model.layers.0.mlp.up_proj.weight                   a text model's own checkpoint
    language_model.model.layers.0.mlp.up_proj.weight    as the hub stores vision models
    model.language_model.layers.0.mlp.up_proj.weight    as transformers 5 calls them in memory

A page with a section `[text_half]` says which architectures hold its family so, and how the prefixes are spelt. Above
this module everything speaks of the text model alone.

Older vision checkpoints (Qwen2-VL and 2.5-VL, as the hub has them) do not nest: the text model's settings stand at the
top of `config.json`, beside `vision_config`. Both come out alike.

A vision model may turn by positions of three parts. How its pairs of components are divided among them stands in
`rope_scaling`, or `rope_parameters`; it comes out beside it, as `mrope_section`. There the text model that is saved
keeps it, since the division is of no matter to a text, and runtimes that find it within a rope want a vision model.
Likewise `deepstack_layers`, to how many layers the tower gives features of an image: a GGUF file says it, so that a
projector file goes with it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from lumen.errors import CheckpointError, SpecError

# What the whole model's config.json says for its text half too. Where both say something, readers go by the whole's.
SHARED_KEYS = ("tie_word_embeddings", "quantization_config", "architectures")
FALLBACK_KEYS = ("torch_dtype", "dtype", "bos_token_id", "eos_token_id", "pad_token_id")

REFUSED = {  # why no page has it
    "Qwen3VLMoeForConditionalGeneration": " Its experts are stored in stacks of another layout than Qwen 3's.",
}

VISION_KEYS = ("vision_", "image_", "video_")  # how keys begin that a config.json which does not nest has for its tower
MROPE_KEYS = ("mrope_section", "mrope_interleaved")
ROPE_PLACES = ("rope_scaling", "rope_parameters")
TEXT_TYPES = {  # model_type of a text half → that of the text model, which for a text computes the same
    **dict.fromkeys(("qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text"), "qwen2"),
    "qwen3_vl_text": "qwen3",
}


@dataclass(frozen=True, kw_only=True)
class TextHalfPage:
    architectures: list[str]  # of vision checkpoints that hold this family
    names: dict[str, list[str]]  # prefix of this page's checkpoint names → its spellings there
    aside: list[str]  # prefixes of the tensors that are no part of the text half
    defaults: dict[str, str | int | float | bool] = field(default_factory=dict)  # what text_config may leave out


def text_config(config: dict, where: str) -> dict:
    """The settings of the text half, where `config` is a vision model's; else `config` itself.

    `architectures` stays that of the whole checkpoint, so that the page can be found by it.
    """
    if "text_config" in config:
        text = _nested(config, where)
    elif "vision_config" in config:
        text = {key: value for key, value in config.items() if not key.startswith(VISION_KEYS)}
    else:
        text = dict(config)
    has_parts = isinstance(text.get("model_type"), str) and text["model_type"] in TEXT_TYPES
    if has_parts:
        text["model_type"] = TEXT_TYPES[text["model_type"]]
    if has_parts and ("text_config" in config or "vision_config" in config):
        _check_sections(text, "text_config." if "text_config" in config else "", where)
    vision = config.get("vision_config")
    if isinstance(vision, dict) and isinstance(fed := vision.get("deepstack_visual_indexes"), list):
        text["deepstack_layers"] = len(fed)
    return _with_sections_beside(text)


def _nested(config: dict, where: str) -> dict:
    """`text_config`, with what `config` says for both halves."""
    if not isinstance(config["text_config"], dict):
        raise SpecError(f"{where}: text_config wants an object, found {config['text_config']!r}.")
    text = dict(config["text_config"])
    text |= {key: config[key] for key in SHARED_KEYS if config.get(key) is not None}
    if "torch_dtype" in text or "dtype" in text:  # one key in two spellings
        config = {key: value for key, value in config.items() if key not in ("torch_dtype", "dtype")}
    text |= {key: config[key] for key in FALLBACK_KEYS if text.get(key) is None and config.get(key) is not None}
    return text


def _check_sections(text: dict, place: str, where: str) -> None:
    """SpecError for a vision model of three-part positions whose rope does not divide the pairs among the parts."""
    ropes = {name: text[name] for name in ROPE_PLACES if text.get(name) is not None}
    if not all(isinstance(rope, dict) for rope in ropes.values()):  # refused where a rope is read
        return
    if _with_sections_beside(text).get("mrope_section") is None:
        raise SpecError(
            f"{where}: {place}{next(iter(ropes), ROPE_PLACES[0])}.mrope_section wants three whole numbers, how many "
            f"pairs of components turn by time, height and width; found none. Copy it from the config.json that the "
            f"model was published with."
        )


def _with_sections_beside(config: dict) -> dict:
    """`config` with the keys of mrope at its top, and a rope that is of the default type where it was called mrope."""
    lifted, ropes = {}, {}
    for place in ROPE_PLACES:
        rope = config.get(place)
        if not isinstance(rope, dict) or "mrope_section" not in rope:
            continue
        lifted |= {key: rope[key] for key in MROPE_KEYS if key in rope}
        rest = {key: value for key, value in rope.items() if key not in MROPE_KEYS}
        ropes[place] = {
            key: "default" if key in ("type", "rope_type") and value == "mrope" else value
            for key, value in rest.items()
        }
    return config | ropes | lifted


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
