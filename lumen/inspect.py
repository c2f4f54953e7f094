"""python -m lumen.inspect: what the data looks like to the model: its tokens, what is learned, how they pack.

Reads the data and the tokenizer, no weights. In each row the tokens that are learned stand out: in colour on a
terminal, between `⟦` and `⟧` elsewhere.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import groupby

from rich.console import Console
from rich.text import Text

from lumen.config import load_config
from lumen.data.packing import Packed
from lumen.errors import ConfigError, LumenError
from lumen.objectives.examples import Examples, load_examples
from lumen.text.conversation import Encoded
from lumen.text.tokenizer import Tokenizer


def summarize(examples: Examples) -> dict:
    """How many examples, rows and tokens there are, how many are learned, and how full the rows are."""
    return {name: _numbers(part) for name, part in (("train", examples.train), ("eval", examples.held_out)) if part}


def _numbers(packed: Packed) -> dict:
    lengths = sorted(len(example.ids) for row in packed.rows for example in row)
    return {
        "examples": packed.examples,
        "rows": len(packed.rows),
        "row_length": packed.length,
        "full": round(packed.efficiency, 4),
        "tokens": packed.tokens,
        "learned": packed.counted,
        "shortest": lengths[0],
        "median": lengths[len(lengths) // 2],
        "longest": lengths[-1],
        "cut": packed.truncated,
        "dropped": packed.dropped,
    }


def spans(example: Encoded, tokenizer: Tokenizer) -> list[tuple[bool, str]]:
    """The example as text, special tokens included, in stretches that are learned or not.

    The first token of a row is never predicted, whatever `learn` says of it.
    """
    marks = zip(example.ids, [False, *example.learn[1:]], strict=True)
    return [
        (learned, b"".join(tokenizer.bytes_of(id) for id, _ in stretch).decode("utf-8", "replace"))
        for learned, stretch in groupby(marks, key=lambda mark: mark[1])
    ]


def show(row: Sequence[Encoded], number: int, tokenizer: Tokenizer, console: Console) -> None:
    """Prints one row, each of its documents under the place that it was read from."""
    tokens = sum(len(example.ids) for example in row)
    console.print(f"row {number}: {len(row)} documents, {tokens} tokens", style="bold", markup=False)
    for example in row:
        console.print(f"  {example.source} · {len(example.ids)} tokens", style="dim", markup=False)
        text = Text()
        for learned, words in spans(example, tokenizer):
            plain = words if console.is_terminal else (f"⟦{words}⟧" if learned else words)
            text.append(plain, style="green" if learned else "dim")
        console.print(text, soft_wrap=True)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0 done, 1 failed, 2 asked wrongly."""
    parser = argparse.ArgumentParser(
        prog="python -m lumen.inspect",
        description="Show a run's data as the model sees it: tokens, what is learned, how they pack.",
        epilog="Example: python -m lumen.inspect lumen-demo --rows 2",
    )
    parser.add_argument("source", help="RUN.toml, the name of a recipe, or a run's folder")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="as in the file, as data.max_length=512")
    parser.add_argument("--rows", type=int, default=1, help="rows to show (default 1)")
    parser.add_argument("--json", action="store_true", help="print the figures and rows as one JSON object on stdout")
    asked = parser.parse_intermixed_args(arguments)
    if asked.rows < 0:
        parser.error(f"--rows wants 0 or more, found {asked.rows}")
    try:
        examples = load_examples(load_config(asked.source, asked.overrides))
    except LumenError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    rows = examples.train.rows[: asked.rows]
    figures = summarize(examples)
    if asked.json:
        written = [[{**vars(example), "spans": spans(example, examples.tokenizer)} for example in row] for row in rows]
        print(json.dumps({**figures, "shown": written}, ensure_ascii=False))
        return 0
    console = Console(highlight=False)
    for number, row in enumerate(rows, 1):
        show(row, number, examples.tokenizer, console)
    for part, numbers in figures.items():
        console.print(f"{part}: " + ", ".join(f"{key} {value:,}" for key, value in numbers.items()), markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
