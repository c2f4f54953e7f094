"""The run as a person wants to see it: a line of progress while it trains, a loss plot and an HTML page afterwards.

Plot and page are made from the run's folder alone, so that they can be made again at any time. A line of metrics.jsonl
that has a "loss" is a training step, one that has an "eval_loss" is an evaluation.

On a GPU a line of progress has TFLOP/s and their share of the vendor's dense peak; `speed.py` says what they count.
"""

import base64
import html
import json
import sys
import time
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from string import Template
from typing import TextIO

import numpy
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column

from lumen.errors import LumenError
from lumen.formats.atomic import write_bytes, write_text
from lumen.run import read_lines

INK, QUIET, LINE, BLUE, PALE, ORANGE = "#22252b", "#7a808c", "#e6e8ec", "#2f62c9", "#aac1ee", "#d9662b"


class Progress:
    """What a person sees while a run trains: a context manager, told every step.

    On a terminal one live line with a bar; anywhere else plain lines with fixed columns, at most one in `every_s`
    seconds, and always the first and the last.
    """

    def __init__(self, total: int, stream: TextIO | None = None, every_s: float = 2.0) -> None:
        """total  steps of the whole run · stream  stderr if None"""
        self.total = total
        stream = stream or sys.stderr
        self._console = Console(file=stream, force_terminal=stream.isatty(), highlight=False, soft_wrap=True)
        is_live = self._console.is_terminal and not self._console.is_dumb_terminal
        self._every_s = every_s
        self._began_s = self._shown_s = time.monotonic()
        self._first: int | None = None  # step, of this process: a resumed run begins later than at 1
        self._pending = ""  # the newest line if it was not shown
        line = TextColumn("{task.fields[text]}", markup=False, table_column=Column(no_wrap=True))
        self._bar = Bar(BarColumn(bar_width=12), line, console=self._console) if is_live else None

    def __enter__(self) -> "Progress":
        self._began_s = time.monotonic()
        if self._bar:
            self._bar.start()
            self._task = self._bar.add_task("", total=self.total, text="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()
        elif self._pending:
            self.say(self._pending)

    def step(self, line: Mapping[str, float]) -> None:
        """Shows one training step; `line` is what goes to metrics.jsonl."""
        now_s = time.monotonic()
        begins = self._first is None
        spent_s = now_s - self._began_s
        if begins:
            self._first, self._began_s = (
                line["step"],
                now_s,
            )  # from here on, what came before the first step is left out
        step_s = spent_s / max(1, line["step"] - self._first)
        # the first step's time holds what came before it, and kernels that were compiled: nothing to go by
        left = "–" if begins and line["step"] < self.total else _duration(step_s * (self.total - line["step"]))
        cells = _cells(line, self.total, left)
        if self._bar:
            text = "  ".join(f"{heading} {text}" for heading, _, text in cells)
            self._bar.update(self._task, completed=line["step"], text=text)
            return
        if begins:
            self.say("  ".join(heading.rjust(width) for heading, width, _ in cells))
        self._pending = "  ".join(text.rjust(width) for _, width, text in cells)
        if begins or now_s - self._shown_s >= self._every_s:
            self.say(self._pending)
            self._shown_s, self._pending = now_s, ""

    def say(self, text: str) -> None:
        """One line among the steps, as the result of an evaluation."""
        self._console.print(text, markup=False)


def _cells(line: Mapping[str, float], total: int, left: str) -> list[tuple[str, int, str]]:
    """(heading, width, text) of every column."""
    return [
        ("step", max(11, 2 * len(f"{total:,}") + 1), f"{line['step']:,}/{total:,}"),
        ("loss", 7, f"{line['loss']:.4f}"),
        ("lr", 8, f"{line['learning_rate']:.2e}"),
        ("grad norm", 9, f"{line['grad_norm']:.3f}"),
        ("tokens/s", 9, f"{line['tokens_per_s']:,.0f}"),
        *([("TFLOP/s", 7, f"{line['tflops']:,.0f}")] if "tflops" in line else []),
        *([("of peak", 7, f"{line['peak_share']:.1%}")] if "peak_share" in line else []),
        ("memory", 10, _bytes(line["peak_memory_bytes"])),
        ("left", 8, left),
    ]


def write_loss_plot(folder: Path | str) -> Path:
    """Draws loss.png from metrics.jsonl: loss of every step and smoothed, evaluations, the learning rate below.

    LumenError if no step has been logged yet.
    """
    from matplotlib.figure import Figure  # a second to import: only who plots pays it

    folder = Path(folder)
    steps, evals = _metrics(folder)
    if not steps:
        raise LumenError(f"{folder}/metrics.jsonl: there is nothing to plot, no step was logged.")
    figure = Figure(figsize=(9, 5.4), dpi=160, facecolor="white", layout="constrained")
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=(5, 1))
    _draw_loss(loss, steps, evals)
    loss.set_title(
        folder.resolve().name, loc="left", color=INK, fontsize=13, fontweight="bold", pad=12, parse_math=False
    )
    _draw_rate(rate, steps)
    for axes in (loss, rate):
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(LINE)
        axes.grid(axis="y", color=LINE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=QUIET, length=0, labelsize=9)
        axes.margins(x=0.01)
    png = BytesIO()
    figure.savefig(png, format="png")
    write_bytes(folder / "loss.png", png.getvalue())
    return folder / "loss.png"


def _draw_loss(axes: object, steps: list[dict], evals: list[dict]) -> None:
    at, values = [line["step"] for line in steps], [line["loss"] for line in steps]
    if len(steps) < 40:  # too few to smooth
        axes.plot(at, values, color=BLUE, linewidth=1.8, marker="o", markersize=4, label="training loss")
        ends = [(at[-1], values[-1], BLUE)]
    else:
        smooth = _smoothed(values)
        axes.plot(at, values, color=PALE, linewidth=1, label="training loss, every step")
        axes.plot(at, smooth, color=BLUE, linewidth=2.2, label="training loss, smoothed")
        ends = [(at[-1], smooth[-1], BLUE)]
    if evals:
        at, values = [line["step"] for line in evals], [line["eval_loss"] for line in evals]
        look = {"marker": "o", "markersize": 5, "markeredgecolor": "white"}
        axes.plot(at, values, color=ORANGE, linewidth=1.6, label="evaluation loss", **look)
        ends.append((at[-1], values[-1], ORANGE))
    for rank, (x, y, color) in enumerate(sorted(ends, key=lambda end: -end[1])):  # the lower number stands lower
        place = {"xytext": (6, -7 if rank else 7), "textcoords": "offset points", "va": "center"}
        axes.annotate(f"{y:.3f}", (x, y), color=color, fontsize=9, fontweight="bold", annotation_clip=False, **place)
    axes.set_ylabel("loss (nats per token)", color=QUIET)
    axes.legend(frameon=False, labelcolor=INK, fontsize=9, loc="upper right")


def _draw_rate(axes: object, steps: list[dict]) -> None:
    at, values = [line["step"] for line in steps], [line["learning_rate"] for line in steps]
    axes.fill_between(at, values, color=QUIET, alpha=0.15, linewidth=0)
    axes.plot(at, values, color=QUIET, linewidth=1.2)
    axes.set_ylim(0, 1.15 * max(values) or 1)
    axes.set_yticks([0, max(values)], ["0", f"{max(values):.1e}"])
    axes.set_ylabel("learning rate", color=QUIET)
    axes.set_xlabel("step", color=QUIET)


def _smoothed(values: Sequence[float]) -> numpy.ndarray:
    """Mean over about a tenth of the run on both sides of each step, the nearer the heavier: it does not lag behind."""
    window = numpy.hanning(len(values) // 10 | 1)[1:-1]  # its ends are zero
    return numpy.convolve(values, window, "same") / numpy.convolve(numpy.ones(len(values)), window, "same")


def write_report(folder: Path | str) -> Path:
    """Writes report.html, one page that needs no other file and no network, from what the run's folder holds by now."""
    folder = Path(folder)
    steps, evals = _metrics(folder)
    summary = json.loads((folder / "summary.json").read_bytes()) if (folder / "summary.json").exists() else {}
    plot = folder / "loss.png"
    image = base64.b64encode(plot.read_bytes()).decode("ascii") if plot.exists() else ""
    page = PAGE.substitute(
        name=html.escape(folder.resolve().name),
        numbers="".join(f"<div><b>{html.escape(value)}</b>{label}</div>" for label, value in _numbers(steps, evals)),
        plot=f'<img alt="loss by step" src="data:image/png;base64,{image}">' if image else "",
        samples=_samples(list(read_lines(folder / "samples.jsonl"))),
        summary="".join(_row(key.replace("_", " "), _text(key, value)) for key, value in summary.items()),
        config=html.escape((folder / "config.toml").read_text("utf-8")),
    )
    write_text(folder / "report.html", page)
    return folder / "report.html"


PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>$name · lumen</title>
<style>
body { max-width: 60rem; margin: 3rem auto; padding: 0 1.5rem; color: #22252b; background: #fff;
       font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 1.5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 .8rem; }
img { width: 100%; margin-top: 1.5rem; }
table { width: 100%; border-collapse: collapse; table-layout: fixed; font-size: .92rem; }
th, td { padding: .55rem .9rem .55rem 0; border-top: 1px solid #e6e8ec; text-align: left; vertical-align: top;
         white-space: pre-wrap; overflow-wrap: anywhere; }
th { color: #7a808c; font-weight: 500; }
pre { padding: 1rem; background: #f6f7f9; border-radius: 6px; overflow-x: auto; font-size: .85rem; line-height: 1.5; }
.numbers { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; color: #7a808c; font-size: .85rem; }
.numbers b { display: block; color: #22252b; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
</style>
<h1>$name</h1>
<div class="numbers">$numbers</div>
$plot
$samples
<h2>Summary</h2>
<table>$summary</table>
<h2>Configuration</h2>
<pre>$config</pre>
</html>
""")


def _numbers(steps: list[dict], evals: list[dict]) -> list[tuple[str, str]]:
    """(label, value) of what one wants to know first."""
    if not steps:
        return [("steps", "0")]
    numbers = [("steps", f"{steps[-1]['step']:,}"), ("training loss", _from_to([line["loss"] for line in steps]))]
    if evals:
        numbers.append(("evaluation loss", _from_to([line["eval_loss"] for line in evals])))
    rates = sorted(line["tokens_per_s"] for line in steps)
    numbers.append(("tokens per second", f"{rates[len(rates) // 2]:,.0f}"))
    return [*numbers, ("peak memory", _bytes(max(line["peak_memory_bytes"] for line in steps)))]


def _samples(lines: list[dict]) -> str:
    """A table of the first and the last answer to every prompt, side by side."""
    if not lines:
        return ""
    first, last = lines[0]["step"], lines[-1]["step"]
    before = {line["prompt"]: line["answer"] for line in lines if line["step"] == first}
    after = {line["prompt"]: line["answer"] for line in lines if line["step"] == last}
    head = f"<tr><th>prompt<th>before, step {first:,}<th>after, step {last:,}</tr>"
    return (
        "<h2>Samples</h2><table>"
        + head
        + "".join(_row(key, before.get(key, ""), after[key]) for key in after)
        + "</table>"
    )


def _row(*cells: str) -> str:
    return "<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in cells) + "</tr>\n"


def _text(key: str, value: object) -> str:
    """A value of the summary in words; the key says its unit."""
    if isinstance(value, dict):
        return "\n".join(f"{name} {_text(name, inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return "\n".join(_text(key, inner) for inner in value)
    if value is None:
        return "–"
    if key.endswith("_bytes"):
        return _bytes(value)
    if key == "seconds":
        return _duration(value)
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def _metrics(folder: Path) -> tuple[list[dict], list[dict]]:
    """(training steps, evaluations)."""
    lines = list(read_lines(folder / "metrics.jsonl"))
    return [line for line in lines if "loss" in line], [line for line in lines if "eval_loss" in line]


def _from_to(values: Sequence[float]) -> str:
    return f"{values[0]:.3f} → {values[-1]:.3f}"


def _bytes(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
