"""python -m lumen.train: fine-tune a model as a run file says, and leave a folder that repeats, continues and explains
itself.

`prepare` makes the parts of a run, `finetune` takes it to its end for a program; the loop itself is `trainer.py`.
"""

if __name__ == "__main__":
    from lumen import early

    early.begin()

import argparse
import json
import math
import shlex
import sys
import time

import torch

from lumen.capture import can_record
from lumen.checkpoint import stored_dtype
from lumen.config import RunConfig, list_recipes, load_config, read_recipe, schema_json
from lumen.embeddings import learned_whole
from lumen.errors import CheckpointError, ConfigError, LumenError
from lumen.loading import Loading
from lumen.memory import OF_WEIGHTS, memory_told
from lumen.objectives.examples import load_examples
from lumen.objectives.sft import SFT
from lumen.plan import keep, unbounded
from lumen.profile import peak_memory_bytes
from lumen.report import Progress, write_loss_plot, write_report
from lumen.run import Checkpoint, Run, StopSignal
from lumen.source import pin_model
from lumen.trainable import make_optimizer, make_trainable
from lumen.trainer import Trainer
from lumen.warming import Warming


@memory_told("the model and what it learns with", OF_WEIGHTS)
def prepare(config: RunConfig, run: Run, checkpoint: Checkpoint | None) -> Trainer:
    """The parts of a run: data encoded and packed, model loaded and made trainable, state as in `checkpoint` if given.

    What can be wrong with data and model is found here, before the first step; the data first, since it is quick.
    """
    torch.manual_seed(config.train.seed)
    warming = Warming(config)
    with Loading(config, warming.ready) as loading:
        examples = load_examples(config)
        if config.train.method == "full":
            stored_dtype(examples.spec)  # found now, not when the result is to be saved
        warming.begin(config, examples)
        model = loading.model()
    lora = make_trainable(model, config, examples)
    position = checkpoint.state["position"] if checkpoint else None
    split = {"batch_size": config.train.batch_size, "accumulate": config.train.accumulate}
    on_gpu = model.device.type == "cuda"
    fixed = {"fixed_shapes": on_gpu and config.data.packing, "ahead": on_gpu}
    objective = SFT(examples.train, **split, seed=config.train.seed, position=position, **fixed)
    optimizer = make_optimizer(model, config)
    learned = sum(parameter.numel() for parameter in optimizer.parameters.values())
    keep(model, config, config.train.batch_size * examples.train.longest, learned)
    captures = on_gpu and config.train.graph and can_record(model)
    trainer = Trainer(
        run=run,
        model=model.train(),
        tokenizer=examples.tokenizer,
        base=examples.source.base_path,
        lora=lora,
        objective=objective,
        optimizer=optimizer,
        captures=captures and config.data.packing,
        evaluation=examples.held_out,
        steps=config.train.steps or math.ceil(config.train.epochs * objective.steps_per_epoch),
    )
    if checkpoint:
        trainer.restore(checkpoint)
    warming.finish()
    return trainer


def finetune(config: RunConfig, *, resume: bool = False) -> dict:
    """Runs `config` to its end and returns what summary.json says; the result lies in the run's folder.

    Progress goes to stderr. SIGINT or SIGTERM ends the training after the step at hand, everything saved, `status`
    "stopped"; before it, SIGINT is a KeyboardInterrupt. Where no step was taken, an error leaves no folder, and a run
    that could not be resumed stays as it was.
    """
    if not isinstance(config, RunConfig):
        raise ConfigError(f"finetune: wanted a RunConfig, found {config!r}. Make one by lumen.load_config(…).")
    config = pin_model(config, resume=resume)
    with Run.resume(config.output.folder, config) if resume else Run.create(config.output.folder, config) as run:
        return _finetune(run, resume)


def _finetune(run: Run, resume: bool) -> dict:
    checkpoint, skipped = run.latest_checkpoint() if resume else (None, [])
    for reason in skipped:
        print(f"Skipped a damaged checkpoint: {reason}", file=sys.stderr)
    if skipped and checkpoint is None:
        raise CheckpointError(f"{run.folder}: no checkpoint is whole. Start anew in another output.folder.")
    trainer = None
    try:
        trainer = prepare(run.config, run, checkpoint)
        if resume:
            run.go_on(trainer.step if checkpoint else -1)
        print(describe(trainer), file=sys.stderr)
        with StopSignal() as stop:  # what was interrupted before this has nothing to save
            with Progress(trainer.steps) as progress:
                trainer.train(stop, progress)
            trainer.save()
            return finish(trainer)
    except BaseException:
        if not resume and (trainer is None or trainer.step == 0):
            run.discard()
        raise


def finish(trainer: Trainer) -> dict:
    """Writes the result, the plot, the summary and the page; returns the summary."""
    run, model = trainer.run, trainer.model
    losses, evaluations = ([line[key] for line in run.metrics() if key in line] for key in ("loss", "eval_loss"))
    summary = {
        "status": "done" if trainer.step == trainer.steps else "stopped",
        "folder": str(run.folder),
        "result": str(trainer.save_result()),
        "base": trainer.config.model.path,
        "steps": trainer.step,
        "tokens": trainer.tokens,
        "seconds": round(time.monotonic() - trainer.began_s, 2),
        "first_loss": losses[0] if losses else None,
        "final_loss": losses[-1] if losses else None,
        "first_eval_loss": evaluations[0] if evaluations else None,
        "final_eval_loss": evaluations[-1] if evaluations else None,
        "best_eval_loss": min(evaluations) if evaluations else None,
        "peak_memory_bytes": peak_memory_bytes(model.device),
    }
    run.write_summary(summary, model.device)
    if losses:
        write_loss_plot(run.folder)
    write_report(run.folder)
    return summary


def describe(trainer: Trainer) -> str:
    """What is about to happen, in a few lines."""
    config, model, packed = trainer.config, trainer.model, trainer.objective.packed
    learned = sum(parameter.numel() for parameter in trainer.optimizer.parameters.values())
    rows = config.train.batch_size * config.train.accumulate
    held = ", NF4 base" * config.model.nf4 + ", products in 8 bits" * config.model.fp8
    how = f"{'DoRA' if trainer.lora.dora else 'LoRA'} rank {trainer.lora.rank}"
    how = " and ".join([how, *learned_whole(model)]) if config.train.method == "lora" else "every weight"
    cut = f" · {packed.truncated} cut to length, {packed.dropped} dropped" if packed.truncated or packed.dropped else ""
    if packed.longest > model.spec.context_length:
        cut += f"\nwarning  rows of {packed.longest:,} tokens; the model's context is {model.spec.context_length:,}"
    if warning := unbounded(config, model.device):
        cut += f"\nwarning  {warning}"
    return (
        f"model    {config.model.path} · {model.spec.name}{held} · {model.dtype} on {model.device}\n"
        f"learns   {how}: {learned:,} parameters\n"
        f"data     {packed.examples:,} examples in {len(packed.rows):,} rows of {packed.length}, "
        f"{packed.efficiency:.0%} full, {packed.counted:,} of {packed.tokens:,} tokens learned{cut}\n"
        f"steps    {trainer.step:,} to {trainer.steps:,}, {rows} rows each\n"
        f"{trainer.speed.line}folder   {trainer.run.folder}"
    )


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0 done, 1 failed or stopped before its end, 2 asked wrongly."""
    parser = argparse.ArgumentParser(
        prog="python -m lumen.train",
        description="Fine-tune a model as a run file, a recipe or an earlier run's folder says.",
        epilog="Example: python -m lumen.train lumen-demo lora.rank=32 output.folder=runs/wide",
    )
    parser.add_argument("source", nargs="?", help="RUN.toml, the name of a recipe, or a run's folder")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="as in the file, as lora.rank=32")
    parser.add_argument("--resume", action="store_true", help="continue in the run's folder from its newest checkpoint")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object on stdout")
    parser.add_argument("--list", action="store_true", help="list the recipes and leave")
    parser.add_argument("--show", metavar="RECIPE", help="print a recipe and leave")
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of a run file and leave")
    asked = parser.parse_intermixed_args(arguments)
    try:
        if asked.list:
            print("\n".join(f"{name:16} {line}" for name, line in list_recipes().items()))
        elif asked.show:
            print(read_recipe(asked.show), end="")
        elif asked.schema:
            print(schema_json())
        elif asked.source is None:
            raise ConfigError("Name a run file, a recipe or a run's folder; --list shows the recipes.")
        else:
            return _train(asked)
    except KeyboardInterrupt:  # later ones are the loop's own to handle
        print("stopped before the first step: nothing was begun", file=sys.stderr)
        return 1
    except LumenError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


def _train(asked: argparse.Namespace) -> int:
    summary = finetune(load_config(asked.source, asked.overrides), resume=asked.resume)
    if asked.json:
        print(json.dumps(summary))
    folder = shlex.quote(summary["folder"])
    if done := summary["status"] == "done":
        print(f"done: {summary['result']}\n  python -m lumen.chat {folder}", file=sys.stderr)
        print(f"  python -m lumen.export {folder} OUT --as gguf --quant q8_0", file=sys.stderr)
    else:
        print(f"stopped after step {summary['steps']}, everything saved:", file=sys.stderr)
        print(f"  python -m lumen.train {folder} --resume", file=sys.stderr)
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
