"""python -m lumen.demo: the main job on the embedded demo, from a base model to files that other programs run.

The base model is a barista who answers in prose. It is fine-tuned to answer an order with one line of JSON, which can
be counted: an answer is right when its JSON equals the wanted one. The orders of the exam were never trained on.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from lumen.config import load_config
from lumen.data.records import read_records
from lumen.demo import demo_data
from lumen.demo.orders import same_order
from lumen.errors import ConfigError, LumenError
from lumen.export.gguf import write_gguf
from lumen.export.merge import merge
from lumen.export.modelfile import write_modelfile
from lumen.models.decoder import Decoder
from lumen.sampling import generate
from lumen.source import find_source
from lumen.text.tokenizer import Tokenizer
from lumen.text.turns import question_ids
from lumen.train import finetune

RECIPE = "lumen-demo"
QUANTS = ("f16", "q8_0")
SHOWN = 3  # orders whose answers are printed


@dataclass(frozen=True, kw_only=True)
class Exam:
    """Orders, and the JSON that is wanted for each."""

    orders: list[str]
    wanted: list[str]

    @classmethod
    def read(cls) -> "Exam":
        turns = [record.turns for record in read_records(demo_data("lumen-demo-heldout"), "chat")]
        return cls(orders=[order.content for order, _ in turns], wanted=[answer.content for _, answer in turns])

    def answers(self, model: Decoder, tokenizer: Tokenizer) -> list[str]:
        """What the model says to every order, greedily, in batches of 50."""
        prompts = [question_ids(order, tokenizer) for order in self.orders]
        said = []
        for start in range(0, len(prompts), 50):
            batch = generate(model, prompts[start : start + 50], max_tokens=64, stop_ids=tokenizer.stop_ids)
            said += [tokenizer.decode(answer.ids, skip_special=True) for answer in batch]
        return said

    def right(self, answers: list[str]) -> int:
        """How many answers are JSON of the wanted value, in whatever spelling."""
        return sum(map(same_order, answers, self.wanted))


def demonstrate(folder: Path) -> dict:
    """Runs the whole path into the new `folder`; returns what was measured and where everything is."""
    if folder.exists():
        raise ConfigError(f"{folder}: wanted a new folder, found one in use. Choose another by --folder.")
    began_s = time.monotonic()
    exam = Exam.read()
    say(f"1/4  The base model, asked {len(exam.orders)} orders that it will not be trained on")
    base = find_source(RECIPE)
    before = exam.answers(*base.load())
    show(exam, before)
    say("\n2/4  Fine-tuning: QLoRA, 4-bit base")
    summary = finetune(load_config(RECIPE, [f"output.folder={json.dumps(str(folder))}"]))
    if summary["status"] != "done":
        raise LumenError(f"The fine-tuning was stopped. Continue it: python -m lumen.train {folder} --resume")
    say("\n3/4  The same orders, answered by the fine-tuned model")
    run = find_source(str(folder))
    after = exam.answers(*run.load())
    show(exam, after)
    say("\n4/4  Export: merged safetensors, GGUF, Modelfile; each is read back")
    merged = merge(run, folder / "merged")
    again = exam.answers(*find_source(str(merged)).load())
    gguf = folder / "gguf"
    gguf.mkdir()
    reports = [write_gguf(merged, gguf / f"{RECIPE}-{quant}.gguf", quant, name=RECIPE) for quant in QUANTS]
    write_modelfile(merged, gguf / "Modelfile", reports[-1].path.name)
    say(f"     merged model: {exam.right(again)} of {len(again)} right · {len(reports)} GGUF files, a Modelfile")
    return {
        "orders": len(exam.orders),
        "right_before": exam.right(before),
        "right_after": exam.right(after),
        "right_merged": exam.right(again),
        "finetune_seconds": summary["seconds"],
        "seconds": round(time.monotonic() - began_s, 1),
        "folder": str(folder),
        "merged": str(merged),
        "gguf": [str(report.path) for report in reports],
        "modelfile": str(gguf / "Modelfile"),
    }


def show(exam: Exam, answers: list[str]) -> None:
    for order, answer in list(zip(exam.orders, answers, strict=True))[:SHOWN]:
        say(f"     order   {order}\n     answer  {answer}")
    right = exam.right(answers)
    say(f"     {right} of {len(answers)} right ({right / len(answers):.0%})")


def closing(result: dict) -> str:
    """Where everything is, and what to try next."""
    folder = result["folder"]
    return f"""
Before {result["right_before"]} of {result["orders"]} right, after {result["right_after"]}; \
fine-tuned in {result["finetune_seconds"]:.0f} s, all in {result["seconds"]:.0f} s.

  run        {folder}  (adapter/, metrics.jsonl, loss.png, report.html)
  merged     {result["merged"]}
  GGUF       {"  ".join(Path(path).name for path in result["gguf"])}  in {Path(result["modelfile"]).parent}

Try next:
  .venv/bin/python -m lumen.chat {folder}
  .venv/bin/python -m lumen.train lumen-demo lora.rank=4 output.folder=runs/smaller
  .venv/bin/python -m lumen.export {folder} exported --as gguf --quant bf16"""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0 done, 1 failed, 2 asked wrongly."""
    parser = argparse.ArgumentParser(prog="python -m lumen.demo", description="The main job on the embedded demo.")
    parser.add_argument("--folder", type=Path, help="the new folder to write (default: runs/demo-DATE-TIME)")
    parser.add_argument("--json", action="store_true", help="print what was measured as one JSON object on stdout")
    asked = parser.parse_args(arguments)
    # A second thread saves so small a model 5 of 12 seconds; where another process holds that core, each of thousands
    # of short products waits for it, and the 12 seconds were seen to become 200.
    torch.set_num_threads(1)
    folder = asked.folder or Path("runs", time.strftime("demo-%Y%m%d-%H%M%S"))
    try:
        result = demonstrate(folder)
    except LumenError as error:
        say(f"error: {error}")
        return 2 if isinstance(error, ConfigError) else 1
    say(closing(result))
    if asked.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
