"""python -m lumen.export: a run or a model leaves as an adapter, a merged folder, or GGUF files and a Modelfile.

With --push what was written goes to the Hub, with a page that says what it is.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from lumen.demo import MODELS
from lumen.errors import CheckpointError, ConfigError, LumenError, closest
from lumen.export.card import WRITER, base_repo, model_card
from lumen.export.gguf import FILE_TYPES, GGUFReport, write_gguf
from lumen.export.merge import BASES, merge
from lumen.export.modelfile import write_modelfile
from lumen.export.nf4 import write_nf4
from lumen.formats.atomic import replacing_folder, write_bytes, write_json, write_text
from lumen.hub import check_push, is_cached, push
from lumen.peft_files import CONFIG_FILE, WEIGHTS_FILE, AdapterWeights, read_adapter_config
from lumen.source import Source, find_source
from lumen.spec import load_family
from lumen.text.tokenizer import FILES

DEFAULT_QUANT = "q8_0"


def export_adapter(source: Source, out: Path, asked: argparse.Namespace) -> dict:
    """Copies the adapter in PEFT's layout, and its tokenizer where it has one; nothing else that lies in its folder."""
    if source.adapter is None:
        raise ConfigError(f"{source.name} has no adapter: it is a whole model. Export it --as merged or gguf.")
    AdapterWeights.read(source.adapter, load_family(source.base))  # what is damaged is not passed on
    with replacing_folder(out) as folder:
        for name in (CONFIG_FILE, WEIGHTS_FILE, *FILES):
            file = source.adapter / name
            if file.is_symlink() and not is_cached(file):
                raise CheckpointError(f"{file} is a link, which is not followed. Put the file itself there.")
            if file.is_file():
                write_bytes(folder / name, file.read_bytes())
        config = read_adapter_config(folder)
        named = str(config.get("base_model_name_or_path") or "")
        if not source.base_id and named not in MODELS and not Path(named).is_absolute():
            # a path from the old place, or from the working directory: it would lead elsewhere from the new one
            write_json(folder / CONFIG_FILE, config | {"base_model_name_or_path": str(source.base.resolve())})
    return {"adapter": str(out)}


def export_merged(source: Source, out: Path, asked: argparse.Namespace) -> dict:
    """Writes base + adapter as a folder of safetensors."""
    return {"merged": str(merge(source, out, base=asked.base))}


def export_nf4(source: Source, out: Path, asked: argparse.Namespace) -> dict:
    """Writes base + adapter as a folder of safetensors in 4 bits, as bitsandbytes lays them out."""
    return {"nf4": str(write_nf4(source, out, base=asked.base))}


def export_gguf(source: Source, out: Path, asked: argparse.Namespace) -> dict:
    """Writes a GGUF file for each quant, the Modelfile of the first, and a README; merges beside `out` on the way."""
    quants = list(dict.fromkeys(asked.quant.split(",")))
    for quant in quants:
        if quant not in FILE_TYPES:
            raise ConfigError(
                f"--quant: {quant!r} is unknown.{closest(quant, FILE_TYPES)} Known: {', '.join(FILE_TYPES)}."
            )
    with replacing_folder(out) as folder, tempfile.TemporaryDirectory(dir=folder.parent, prefix=".merge-") as scratch:
        model = source.base
        if source.adapter is not None or asked.base != "original":
            model = merge(source, Path(scratch) / "merged", base=asked.base)
        if asked.modelfile:  # first: where the chat template cannot be proven, nothing large has been written yet
            write_modelfile(model, folder / "Modelfile", f"{source.name}-{quants[0]}.gguf")
        reports = []
        for quant in quants:
            say(f"writing {source.name}-{quant}.gguf")
            reports.append(write_gguf(model, folder / f"{source.name}-{quant}.gguf", quant, name=source.name))
        write_text(folder / "README.md", _readme(source, reports, asked.modelfile))
    for report in reports:
        for sentence in (*report.fallbacks, *report.differences):
            say(f"{report.path.name}: {sentence}")
    return {
        "files": {report.quant: str(out / report.path.name) for report in reports},
        "size_bytes": {report.quant: report.size_bytes for report in reports},
        "types": {report.quant: report.types for report in reports},
        "fallbacks": {report.quant: list(report.fallbacks) for report in reports},
        "differences": list(reports[0].differences),
        "modelfile": str(out / "Modelfile") if asked.modelfile else None,
    }


EXPORTS: dict[str, Callable[[Source, Path, argparse.Namespace], dict]] = {
    "adapter": export_adapter,
    "merged": export_merged,
    "nf4": export_nf4,
    "gguf": export_gguf,
}


def _readme(source: Source, reports: list[GGUFReport], modelfile: bool) -> str:
    name, base = source.name.lower(), source.base_id or source.base.name
    ollama = (
        f"With Ollama, in this folder:\n\n    ollama create {name} -f Modelfile\n    ollama run {name}\n\n"
        "The Modelfile names the first file; change its FROM line to use another.\n\n"
    )
    rows = "\n".join(f"| {report.path.name} | {report.quant} | {report.size_bytes:,} |" for report in reports)
    return (
        f"# {source.name}\n\nMade by lumen from `{base}`{' and an adapter' if source.adapter else ''}. "
        "Every tensor was read back and compared with its source.\n\n"
        f"| file | type | bytes |\n|---|---|---|\n{rows}\n\n"
        f"{ollama if modelfile else ''}With llama.cpp:\n\n    llama-cli -m {reports[0].path.name} -cnv\n"
    )


REPLACES = {  # what an older export of this form may have left in a repository, and would now contradict the new one
    "merged": ("model*.safetensors", "model.safetensors.index.json"),
    "nf4": ("model*.safetensors", "model.safetensors.index.json"),
}


def push_export(source: Source, out: Path, asked: argparse.Namespace) -> str:
    """Writes the page of an exported folder and uploads the folder; returns the repository's address."""
    readme = out / "README.md"
    write_text(readme, model_card(source, asked.form, readme.read_text("utf-8") if readme.is_file() else ""))
    if asked.form == "adapter" and not base_repo(source):
        named = json.loads((out / CONFIG_FILE).read_text("utf-8")).get("base_model_name_or_path")
        say(f"note: {CONFIG_FILE} names the base as {named!r}, which whoever downloads the adapter does not have.")
    try:
        return push(
            out,
            asked.push,
            private=asked.private,
            message=f"{WRITER}: {asked.form}",
            replaces=REPLACES.get(asked.form, ()),
        )
    except LumenError as error:
        raise type(error)(f"{error} The export is whole: hf upload {asked.push} {out} sends it again.") from None


def say(text: str) -> None:
    print(text, file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0 done, 1 failed, 2 asked wrongly."""
    parser = argparse.ArgumentParser(
        prog="python -m lumen.export",
        description="Export a run or a model; weights and GGUF files are read back and compared.",
        epilog="Example: python -m lumen.export runs/lumen-demo out --as gguf --quant f16,q8_0",
    )
    parser.add_argument("source", help="a folder of a run, a model or an adapter, owner/name of the Hub, or lumen-demo")
    parser.add_argument("out", type=Path, help="the new folder to write")
    parser.add_argument("--as", dest="form", choices=EXPORTS, required=True, help="what to write")
    parser.add_argument(
        "--quant",
        help=f"for gguf: one or more of {', '.join(FILE_TYPES)} (default {DEFAULT_QUANT})",
    )
    parser.add_argument(
        "--base",
        choices=BASES,
        help="what the adapter is added to: the original weights, the default, or their 4-bit image as in training",
    )
    parser.add_argument(
        "--no-modelfile",
        dest="modelfile",
        action="store_false",
        help="for gguf: leave the Modelfile out, as for a chat template that Ollama's language cannot express",
    )
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload what was written, with a page, to this repository")
    parser.add_argument("--private", action="store_true", help="with --push: only into a private repository")
    parser.add_argument("--json", action="store_true", help="print what was written as one JSON object on stdout")
    asked = parser.parse_args(arguments)
    if asked.private and not asked.push:
        parser.error("--private goes with --push OWNER/NAME")
    for option, given, forms in (
        ("--quant", asked.quant is not None, ("gguf",)),
        ("--no-modelfile", not asked.modelfile, ("gguf",)),
        ("--base", asked.base is not None, ("merged", "nf4", "gguf")),
    ):
        if given and asked.form not in forms:
            parser.error(f"{option} changes nothing --as {asked.form}; it goes with --as {' or '.join(forms)}")
    asked.quant, asked.base = asked.quant or DEFAULT_QUANT, asked.base or "original"
    try:
        if asked.push:
            check_push(asked.push)  # before the work
        source = find_source(asked.source)
        written = EXPORTS[asked.form](source, asked.out, asked)
        if asked.push:
            written["pushed"] = push_export(source, asked.out, asked)
    except LumenError as error:
        say(f"error: {error}")
        return 2 if isinstance(error, ConfigError) else 1
    say(f"done: {asked.out}")
    if asked.push and not asked.json:
        print(written["pushed"])
    if asked.json:
        print(json.dumps({"out": str(asked.out), **written}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
