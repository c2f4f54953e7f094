"""What a person is shown: progress, a plot, a page; and nothing that was not in the run's folder."""

import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lumen.config import load_config
from lumen.errors import LumenError
from lumen.report import Progress, _duration, _smoothed, write_loss_plot, write_report
from lumen.run import Run

HOSTILE = "<script>alert('&')</script> $name"


def line(step: int, loss: float = 1.5) -> dict:
    return {
        "step": step,
        "tokens": 4096,
        "loss": loss,
        "learning_rate": 2e-4,
        "grad_norm": 0.75,
        "tokens_per_s": 12_345.6,
        "peak_memory_bytes": 3 * 2**29,
    }


@pytest.fixture
def run(tmp_path: Path) -> Run:
    told = tmp_path / "run.toml"
    told.write_text("")
    config = load_config(told, ["model.path=lumen-demo", f"data.train={HOSTILE}.jsonl"])
    return Run.create(tmp_path / "my $x_{ run", config)


@pytest.mark.parametrize("steps", [1, 60])
def test_the_plot_is_a_png_for_short_and_long_runs(run, steps):
    for step in range(1, steps + 1):
        run.log(line(step, 3 / step))
    run.log({"step": steps, "eval_loss": 2.0})
    assert write_loss_plot(run.folder).read_bytes().startswith(b"\x89PNG")


def test_there_is_no_plot_before_the_first_step(run):
    with pytest.raises(LumenError, match="no step was logged"):
        write_loss_plot(run.folder)


def test_smoothing_keeps_a_constant_and_lies_on_a_line():
    assert _smoothed([2.0] * 100).tolist() == pytest.approx([2.0] * 100)
    assert _smoothed([float(n) for n in range(100)])[10:90].tolist() == pytest.approx(list(range(10, 90)))


class Page(HTMLParser):
    """The tags of a page, and its words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data


def test_the_page_shows_answers_before_and_after_side_by_side(run):
    run.log_samples(0, ["What is 2+2?"], ["fish"])
    run.log(line(1))
    run.log_samples(1, ["What is 2+2?"], ["perhaps 3"])
    run.log_samples(9, ["What is 2+2?"], ["4"])
    text = write_report(run.folder).read_text()
    assert "before, step 0" in text and "after, step 9" in text
    assert "<td>What is 2+2?<td>fish<td>4" in text


def test_the_page_needs_no_other_file(run):
    run.log(line(1))
    write_loss_plot(run.folder)
    page = Page(write_report(run.folder).read_text())
    sources = [attributes["src"] for _, attributes in page.tags if "src" in attributes]
    assert len(sources) == 1 and sources[0].startswith("data:image/png;base64,")
    assert not [attributes for tag, attributes in page.tags if tag in {"link", "script"} or "href" in attributes]


def test_what_a_model_or_a_person_wrote_cannot_become_markup(run):
    run.log_samples(0, [HOSTILE], [HOSTILE])
    run.write_summary({HOSTILE: HOSTILE}, "cpu")
    page = Page(write_report(run.folder).read_text())
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.words.count(HOSTILE) >= 5, "it is shown as it was written, in samples, summary and configuration"


def test_the_page_is_written_for_a_run_that_has_only_begun(run):
    text = write_report(run.folder).read_text()
    assert "<b>0</b>steps" in text and "<img" not in text


def test_the_page_gives_units_to_the_summary(run):
    run.write_summary(
        {"peak_memory_bytes": 3 * 2**29, "best_eval_loss": None, "seconds": 3725.2, "final_loss": 0.51239}, "cpu"
    )
    text = write_report(run.folder).read_text()
    assert "1.50 GiB" in text and "1:02:05" in text and "<td>–" in text and "0.5124" in text


def shown(steps: range, total: int, every_s: float) -> list[str]:
    stream = io.StringIO()
    with Progress(total, stream, every_s) as progress:
        for step in steps:
            progress.step(line(step))
    return stream.getvalue().splitlines()


def test_plain_progress_is_a_heading_and_one_line_a_step_in_fixed_columns():
    lines = shown(range(1, 4), 3, every_s=0)
    assert lines[0].split() == ["step", "loss", "lr", "grad", "norm", "tokens/s", "memory", "left"]
    assert [text.split()[:5] for text in lines[1:]] == [
        [f"{step}/3", "1.5000", "2.00e-04", "0.750", "12,346"] for step in (1, 2, 3)
    ]
    assert len({len(text) for text in lines}) == 1


def test_columns_stay_where_they_are_in_long_runs_and_large_memories():
    stream = io.StringIO()
    with Progress(1_250_000, stream, 0) as progress:
        progress.step(line(1))
        progress.step(line(1_000_000) | {"peak_memory_bytes": 139 * 2**30})
    lines = stream.getvalue().splitlines()
    assert len({len(text) for text in lines}) == 1
    assert "139.00 GiB" in lines[2]


def test_the_first_line_promises_no_end():
    lines = shown(range(1, 3), 2, every_s=0)
    assert lines[1].endswith(" –") and lines[2].endswith(" 0:00")


def test_on_a_gpu_progress_tells_operations_and_their_share_of_the_peak():
    stream = io.StringIO()
    with Progress(1, stream) as progress:
        progress.step(line(1) | {"tflops": 612.4, "peak_share": 0.6190})
    heading, numbers = stream.getvalue().splitlines()
    assert "tokens/s  TFLOP/s  of peak" in heading
    assert numbers.split()[4:7] == ["12,346", "612", "61.9%"] and len(heading) == len(numbers)


def test_plain_progress_is_rare_but_shows_the_first_and_the_last_step():
    lines = shown(range(1, 101), 100, every_s=1000)
    assert [text.split()[0] for text in lines[1:]] == ["1/100", "100/100"]
    stopped_early = shown(range(1, 51), 100, every_s=1000)
    assert [text.split()[0] for text in stopped_early[1:]] == ["1/100", "50/100"]


def test_the_time_left_counts_only_this_process_when_resumed():
    assert re.search(r" 0:00$", shown(range(900, 1001), 1000, every_s=1000)[-1])


def test_progress_on_a_terminal_is_one_live_line(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with Progress(2, stream) as progress:
        progress.step(line(1))
        progress.say("evaluation [0] loss 1.25")
        progress.step(line(2))
    assert "evaluation [0] loss 1.25" in stream.getvalue()
    assert "loss 1.5000" in stream.getvalue()


def test_durations_are_read_at_a_glance():
    assert [_duration(seconds) for seconds in (0, 59.6, 3725, math.pi)] == ["0:00", "1:00", "1:02:05", "0:03"]
