"""The page of an exported model on the Hub: what it is made from and how, as text and as the metadata the Hub reads.

Nothing in it tells of the machine it was made on: no path, and no name of a data file.
"""

import json
from importlib import metadata

from lumen.config import RunConfig, load_config
from lumen.hub import is_id, parse_id
from lumen.peft_files import CONFIG_FILE, read_adapter_config
from lumen.source import Source

# by the form of the export
LIBRARIES = {"adapter": "peft", "merged": "transformers", "nf4": "transformers", "gguf": "gguf"}


def model_card(source: Source, form: str, body: str = "") -> str:
    """README.md for the Hub.

    form  as in `LIBRARIES`
    body  what it says after the heading, where the export wrote something already
    """
    config = load_config(source.run) if source.run else None
    base = base_repo(source, config)
    facts = {
        "base_model": base,
        "base_model_relation": _relation(source, form, config) if base else None,
        "library_name": LIBRARIES[form],
        "pipeline_tag": "text-generation",
        "tags": ["lumen", *(["lora"] if source.adapter else [])],
    }
    head = "\n".join(f"{key}: {json.dumps(value)}" for key, value in facts.items() if value)  # JSON is YAML
    body = body or f"# {source.name}\n\n{LEADS[form]} of {base or 'a local model'}.\n"
    return f"---\n{head}\n---\n\n{body}\n## How it was made\n\n{_history(source, config)}Written by {WRITER}.\n"


def _writer() -> str:
    try:
        return f"lumen {metadata.version('lumen')}"
    except metadata.PackageNotFoundError:  # run from a source tree
        return "lumen"


WRITER = _writer()
LEADS = {
    "adapter": "A LoRA adapter in PEFT's layout, on top",
    "merged": "Weights",
    "nf4": "Weights in 4 bits (NF4, as bitsandbytes lays them out)",
    "gguf": "GGUF files",
}


def base_repo(source: Source, config: RunConfig | None = None) -> str:
    """owner/name of the base on the Hub, empty where it is a local folder."""
    id = source.base_id or (config.model.path if config else "")
    return parse_id(id).repo if is_id(id) else ""


def _relation(source: Source, form: str, config: RunConfig | None) -> str:
    if form == "adapter":
        return "adapter"
    return "finetune" if form == "merged" and (source.adapter or config) else "quantized"


def _history(source: Source, config: RunConfig | None) -> str:
    """What is known of the training, one fact a line."""
    facts = []
    if source.base_id:
        facts.append(f"base: `{source.base_id}`")
    if config:
        train, lora = config.train, config.lora
        nf4 = ", base in 4 bits (NF4)" if config.model.nf4 else ""
        how = f"LoRA, rank {lora.rank}, alpha {lora.alpha:g}{nf4}" if train.method == "lora" else "every weight"
        facts += [f"learned: {how}", f"learning rate: {train.lr:g}, {train.schedule}", f"seed: {train.seed}"]
        facts += _measured(source)
    elif source.adapter:
        adapter = read_adapter_config(source.adapter)
        facts.append(f"learned: LoRA, rank {adapter.get('r')}, alpha {adapter['lora_alpha']:g} (`{CONFIG_FILE}`)")
    return "".join(f"- {fact}\n" for fact in facts) + ("\n" if facts else "")


def _measured(source: Source) -> list[str]:
    file = source.run / "summary.json"
    if not file.is_file():  # a run that was stopped has weights, but no end to tell of
        return []
    summary = json.loads(file.read_text("utf-8"))
    facts = [f"steps: {summary['steps']:,}, {summary['tokens']:,} tokens"]
    loss, evaluation = summary.get("final_loss"), summary.get("final_eval_loss")
    facts += [f"loss at the last step: {loss:.4f}"] if loss is not None else []
    return facts + ([f"evaluation loss: {evaluation:.4f}"] if evaluation is not None else [])
