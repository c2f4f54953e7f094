"""The pages of `model_specs/` as text for readers: all families beside each other, or one with every tensor it holds.

A page leaves some numbers to `config.json`. They stand here as the page writes them, the key between backticks; no
number is made up. What shapes a tensor is in the page's `[sizes]`, so shapes and names come from a bound `ModelSpec`,
the same that loading and export read.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import Field, fields, replace
from itertools import groupby

from lumen.errors import ConfigError, closest
from lumen.page import ExpertsPage, Flag, Key, LogitsPage, Number, Page, RopePage, page_names, read_page
from lumen.spec import Family, ModelSpec

REFERENCE = "llama3.1"  # the plain shape that every other family varies

FAMILIES = """\
# Model families

`model_specs/` holds one page of facts per generation of a model family, from which loading, the forward pass, LoRA,
export and chat all read. This file is written by `scripts/families_table`; edit the pages instead.

## How to read a page

- A number is a number; a string in its place is a (dotted) key of `config.json`; of a list, the first that exists
  counts.
- `[match]` chooses among pages of one architecture, `[expect]` states what the code takes for granted; in both, a list
  is a choice, and "present" and "absent" ask whether the key holds anything but null.
- `[block]`, `[embed]`, `[attention]`, `[rope.KIND]` and `[logits]` hold the switches; one that is left out has its
  default.
- `[tensors]`: `role = [checkpoint, GGUF, transform to GGUF]`, without `.weight`; rows of a block without its prefix;
  `*` is the number of an expert, all of which are one role and one tensor of a GGUF file.
- `[sizes]` serves plans and tests, a checkpoint's `config.json` holds the truth; `[lora]`, `[gguf]` and `[chat]` are
  for adapters, export and conversations.

## The switches

**Bold** differs from the page {reference}; a word set as `code` is the key of `config.json` that holds the value; 0 is
off; – means that the family has no such layers. `scripts/describe_family NAME` prints one family with every tensor and
its three names.

{table}
"""


def families_page() -> str:
    """`model_specs/README.md`: how to read a page, and the table of switches and families."""
    return FAMILIES.format(reference=REFERENCE, table=_families_table())


def describe_family(name: str, size: str | None = None) -> str:
    """One family at one of its `[sizes]`, the first by default: switches, and each tensor with its shape and names.

    ConfigError for a family or a size that no page has.
    """
    page = _page(name)
    size = _size(page, size)
    spec = _bind(page, size)
    numbers = ", ".join(f"{key} {value}" for key, value in page.sizes[size].items())
    tensors = [
        (tensor.role, str(tensor.shape), tensor.checkpoint, tensor.gguf, tensor.transform)
        for tensor in spec.tensors()
        if tensor.role.startswith("blocks.0.") or not tensor.role.startswith("blocks.")
    ]
    kinds = Counter(layer.kind for layer in spec.layers)
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    notes = [f"All {len(spec.layers)} blocks hold the tensors of blocks.0; by what a layer sees: {counts}."]
    if len({tensor.checkpoint for tensor in spec.tensors()}) < len(list(spec.tensors())):
        notes.append("Roles that have a name in common lie in that tensor one below the other, in this order.")
    if page.embed.tied is None:
        notes.append("Where tie_word_embeddings is true there is no head.weight.")
    if page.gguf.extra:
        notes.append(f"A GGUF file also holds: {', '.join(page.gguf.extra)}.")
    parts = [
        f"{name} {size}: {numbers}",
        _columns(switches(page).items()) + "\na word in `backticks` is the key of config.json that holds the value",
        _columns([("role", "shape", "checkpoint", "GGUF", "transform to GGUF"), *tensors]),
        "\n".join(notes),
    ]
    return "\n\n".join(parts) + "\n"


def switches(page: Page) -> dict[str, str]:
    """What a page decides, `block.norm` and the like; every field of the sections is here, so a new one shows."""
    decided = {}
    for name in ("block", "embed", "attention", "logits"):
        section = getattr(page, name)
        decided |= {f"{name}.{field.name}": _value(field, getattr(section, field.name)) for field in fields(section)}
    for field in fields(ExpertsPage):
        decided[f"experts.{field.name}"] = _value(field, getattr(page.experts, field.name)) if page.experts else "–"
    decided["rope.full"] = _kind(page.rope["full"])
    without = "as full" if "window" in page.attention.layers else "–"
    decided["rope.window"] = _kind(page.rope["window"]) if "window" in page.rope else without
    return decided | {"gguf.arch": page.gguf.arch}


def _number(value: Number) -> str:
    options = value if isinstance(value, list) else [value]
    return " or ".join(f"`{option}`" if isinstance(option, str) else f"{option:g}" for option in options)


def _kind(rope: RopePage) -> str:
    kinds = rope.kind if isinstance(rope.kind, str) else " or ".join(rope.kind)
    return kinds if rope.partial == 1.0 else f"{kinds}, on a share of a head: {_number(rope.partial)}"


def _value(field: Field, value: object) -> str:
    if field.type == Key and value is None:
        return "none"
    if field.type in (Flag, Key) and isinstance(value, str):
        return f"`{value}`"
    if field.type == Number:  # a string is a key there
        return _number(value)
    if value is None:  # embed.tied, the one switch that a page may leave open
        return "`tie_word_embeddings`"
    if isinstance(value, list):
        runs = [(word, len(list(run))) for word, run in groupby(value)]
        return " ".join(word if count == 1 else f"{count}×{word}" for word, count in runs) or "none"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _families_table() -> str:
    pages = [read_page(name) for name in sorted(page_names(), key=lambda name: (name != REFERENCE, name))]
    decided = [switches(page) for page in pages]
    rows = [["switch", *(page.name for page in pages)], ["---"] * (len(pages) + 1)]
    for switch, plain in decided[0].items():
        values = [family[switch] for family in decided]
        rows.append([switch, *(value if value == plain else f"**{value}**" for value in values)])
    rows.append(["sizes", *(", ".join(page.sizes) for page in pages)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _page(name: str) -> Page:
    if name not in page_names():
        hint = closest(name, page_names())
        raise ConfigError(f"There is no family {name!r}.{hint} Known: {', '.join(page_names())}.")
    return read_page(name)


def _size(page: Page, size: str | None) -> str:
    if size is None and page.sizes:
        return next(iter(page.sizes))
    if size not in page.sizes:
        known = ", ".join(page.sizes) or "none"
        raise ConfigError(f"{page.name} has no size {size!r}.{closest(str(size), page.sizes)} Known: {known}.")
    return size


def _bind(page: Page, size: str) -> ModelSpec:
    """The page at one of its sizes: right in names, shapes and kinds of layers; its other numbers are stand-ins."""
    plain = replace(
        page,
        expect={},
        attention=replace(page.attention, scale=1.0, softcap=0.0, window=1),
        rope={"full": RopePage(kind="plain", theta=1.0)},
        logits=LogitsPage(),
        experts=replace(page.experts, normalize=True, step=1, dense="") if page.experts else None,
    )
    keys = Family(page).size_keys
    config = {keys[name]: value for name, value in page.sizes[size].items()}
    unshaped = {"max_position_embeddings": 1, "rms_norm_eps": 1.0}
    return Family(plain).bind(config | unshaped, f"model_specs/{page.name}.toml, size {size!r}")


def _columns(rows: Iterable[Sequence[str]]) -> str:
    """Rows of cells as aligned lines."""
    rows = list(rows)
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
