"""python -m lumen.train: fine-tune a model as a run file says, and leave a folder that repeats, continues and explains
itself.

`prepare` makes the parts, `Trainer.train` is the loop, `finetune` puts the two together for a program.
"""

if __name__ == "__main__":
    from lumen import early

    early.begin()

import argparse
import json
import math
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lumen.adapter import save_adapter
from lumen.capture import Passes, can_record
from lumen.checkpoint import save_model, stored_dtype
from lumen.config import Lora, RunConfig, list_recipes, load_config, read_recipe, schema_json
from lumen.data.batch import Batch
from lumen.data.packing import Packed
from lumen.embeddings import learned_whole
from lumen.errors import CheckpointError, ConfigError, LumenError
from lumen.loading import Loading
from lumen.memory import OF_A_PASS, OF_WEIGHTS, memory_told
from lumen.models.decoder import Decoder
from lumen.objectives.base import Objective
from lumen.objectives.examples import load_examples
from lumen.objectives.sft import SFT, mean_loss
from lumen.optim import AdamW, clip_factor, gradient_norm, learning_rate
from lumen.plan import keep
from lumen.profile import peak_memory_bytes, recorded
from lumen.report import Progress, write_loss_plot, write_report
from lumen.run import Checkpoint, Run, StopSignal, random_state, restore_random_state
from lumen.sampling import generate
from lumen.source import pin_model
from lumen.speed import Speed
from lumen.text.tokenizer import Tokenizer
from lumen.text.turns import question_ids
from lumen.trainable import make_optimizer, make_trainable
from lumen.warming import Warming


@dataclass(frozen=True, kw_only=True)
class Update:
    """What one step measured; the tensors may still be on their way."""

    step: int
    epoch: float
    tokens: int
    loss: torch.Tensor
    norm: torch.Tensor
    learning_rate: float
    sources: tuple[str, ...]

    @classmethod
    def of(cls, trainer: "Trainer", micro: list[Batch], loss: torch.Tensor, norm: torch.Tensor, lr: float) -> "Update":
        return cls(
            step=trainer.step + 1,
            epoch=round(trainer.objective.epochs_done(), 4),
            tokens=sum(int(batch.filled) for batch in micro),
            loss=loss,
            norm=norm,
            learning_rate=lr,
            sources=tuple(source for batch in micro for source in batch.sources),
        )


@dataclass
class Trainer:
    """One run in the making: its parts, and where it stands. `train` takes it to its end."""

    run: Run
    model: Decoder
    tokenizer: Tokenizer
    base: str  # path or id of the base model, as the adapter names it
    lora: Lora  # what the adapter was attached with
    objective: Objective
    optimizer: AdamW
    evaluation: Packed | None
    steps: int
    step: int = 0  # finished updates
    tokens: int = 0  # that went through the model
    began_s: float = field(default_factory=time.monotonic)
    clock_s: float = 0.0  # when the last line was logged
    captures: bool = False  # whether a step is run as a CUDA graph

    def __post_init__(self):
        self.healthy = torch.zeros((), device=self.model.device)
        full, fp8 = self.config.train.method == "full", self.config.model.fp8
        self.speed = Speed.of(self.model, self.objective.packed, learns_base=full, fp8=fp8)

    @property
    def config(self) -> RunConfig:
        return self.run.config

    def train(self, stop: StopSignal, progress: Progress) -> None:
        """Steps until the last, or until a signal asks to stop; the model and the run's folder change as it goes."""
        config, objective, model = self.config.train, self.objective, self.model
        schedule = {name: getattr(config, name) for name in ("lr", "schedule", "warmup_steps", "warmup_fraction")}
        batches, parameters = objective.batches(model), self.optimizer.parameters.values()
        passes = Passes(model, objective.loss, capture=self.captures)
        pending: Update | None = None  # on a GPU an update is read while the next one runs
        if self.step == 0 and not any(self.run.metrics()):
            self.evaluate(progress)
            self.sample(progress)
        self.clock_s = time.monotonic()
        while self.step < self.steps and not stop.requested:
            micro = next(batches)
            count = max(sum(int(batch.counted) for batch in micro), 1)
            with self._profiled():
                total = sum(passes.run(batch).total for batch in micro)
                # divided after the backward pass: sums keep the small gradients of float16 above zero
                norm = gradient_norm(parameters) / count
                self.healthy += (total + norm) * 0  # NaN from the first loss or gradient on that is not finite
                lr = learning_rate(self.step, self.steps, **schedule)
                update = Update.of(self, micro, total / count, norm, lr)
                if model.device.type == "cpu":
                    self._refuse_divergence(update)
                self.optimizer.step(lr, clip_factor(norm, config.clip) / count + self.healthy)
                self.optimizer.zero_grad(keep=passes.capture)
            self.step += 1
            pending, done = update, pending
            if done is not None:
                self._log(done, progress)
            if self._pauses() or stop.requested or model.device.type == "cpu":
                self._log(pending, progress)
                pending = None
                self._at_step(progress)
                self.clock_s = time.monotonic()
        if pending is not None:
            self._log(pending, progress)

    def _log(self, update: "Update", progress: Progress) -> None:
        """Reads what an update measured, which waits for it, and writes its line."""
        self._refuse_divergence(update)
        self.tokens += update.tokens
        now_s = time.monotonic()
        tokens_per_s, self.clock_s = update.tokens / (now_s - self.clock_s), now_s
        line = {
            "step": update.step,
            "epoch": update.epoch,
            "tokens": self.tokens,
            "loss": update.loss.item(),
            "learning_rate": update.learning_rate,
            "grad_norm": update.norm.item(),
            "tokens_per_s": tokens_per_s,
            "peak_memory_bytes": peak_memory_bytes(self.model.device),
            **self.speed.figures(tokens_per_s),
        }
        self.run.log(line)
        progress.step(line)

    def _profiled(self) -> AbstractContextManager[None]:
        """Records the fifth step, or the last of a shorter run, where train.profile asks for it."""
        asked = self.config.train.profile and self.step == min(4, self.steps - 1)
        return recorded(self.run.folder, self.model.device) if asked else nullcontext()

    def _pauses(self) -> bool:
        """Whether something is due after this update that reads or writes the run as it stands."""
        config = self.config.train
        return self.step == self.steps or any(
            _due(self.step, every) for every in (config.save_every, config.eval_every, config.sample_every)
        )

    def _at_step(self, progress: Progress) -> None:
        """What the configuration wants after this update, and in any case after the last; saving comes first."""
        config, last = self.config.train, self.step == self.steps
        if last or _due(self.step, config.save_every):
            self.save()
        if last or _due(self.step, config.eval_every):
            self.evaluate(progress)
        if last or _due(self.step, config.sample_every):
            self.sample(progress)

    def _refuse_divergence(self, update: "Update") -> None:
        """LumenError for a loss or gradient that is not finite; the optimizer has moved nothing since."""
        loss, norm, sources = update.loss.item(), update.norm.item(), update.sources
        if math.isfinite(loss) and math.isfinite(norm):
            return
        self.optimizer.zero_grad()
        named = ", ".join(sources[:8]) + (f" and {len(sources) - 8} more" if len(sources) > 8 else "")
        raise LumenError(
            f"Step {update.step}: the loss is {loss} and the gradient's norm {norm}; nothing was updated. The batch: "
            f"{named}. Look at these records, else lower train.lr ({self.config.train.lr}) or raise the warm-up. With "
            "a checkpoint (train.save_every), --resume continues from there."
        )

    def evaluate(self, progress: Progress) -> None:
        """Logs the loss on the held-out records, where there are any."""
        if self.evaluation is None:
            return
        loss = mean_loss(self.model, self.evaluation, self.config.train.batch_size)
        if not math.isfinite(loss):
            raise LumenError(f"The evaluation loss after step {self.step} is {loss}: the model has diverged.")
        self.run.log({"step": self.step, "eval_loss": loss})
        progress.say(f"step {self.step}: evaluation loss {loss:.4f}")

    @memory_told("answers to sample.prompts", OF_A_PASS)
    def sample(self, progress: Progress) -> None:
        """Logs what the model answers to the sample prompts."""
        sample = self.config.sample
        if not sample.prompts:
            return
        prompts = [question_ids(prompt, self.tokenizer) for prompt in sample.prompts]
        options = {"max_tokens": sample.max_tokens, "temperature": sample.temperature, "seed": self.config.train.seed}
        answers = [
            self.tokenizer.decode(answer.ids, skip_special=True)
            for answer in generate(self.model, prompts, stop_ids=self.tokenizer.stop_ids, **options)
        ]
        self.run.log_samples(self.step, sample.prompts, answers)
        for prompt, answer in zip(sample.prompts, answers, strict=True):
            progress.say(f"step {self.step}: {prompt!r} → {answer!r}")

    def save(self) -> None:
        """Writes a checkpoint from which the run continues exactly."""
        weights = {name: parameter.detach() for name, parameter in self.optimizer.parameters.items()}
        state = {
            "tokens": self.tokens,
            "seconds": time.monotonic() - self.began_s,
            "position": self.objective.position(),
            "conditions": self.conditions(),
            "random": random_state(),
        }
        self.run.save_checkpoint(self.step, {"weights": weights, "optimizer": self.optimizer.state_tensors()}, state)

    def conditions(self) -> dict[str, str]:
        """What must be the same for a resumed run to be the run that was begun, beside its configuration."""
        return {
            "the encoded data": self.objective.packed.fingerprint,
            "the device": self.model.device.type,
            "the dtype": str(self.model.dtype),
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Puts weights, optimizer, counters and random states where `checkpoint` left them."""
        for what, now in self.conditions().items():
            if (before := checkpoint.state["conditions"][what]) != now:
                raise CheckpointError(
                    f"Checkpoint {checkpoint.step}: {what} was {before}, is {now}. The run cannot be continued "
                    "exactly; restore what has changed, or start a new run by output.folder=…"
                )
        for name, parameter in self.optimizer.parameters.items():
            saved = checkpoint.tensors["weights"].get(name)
            if saved is None or saved.shape != parameter.shape:
                found = "nothing" if saved is None else tuple(saved.shape)
                raise CheckpointError(
                    f"Checkpoint {checkpoint.step}: {name!r} wants {tuple(parameter.shape)}, found {found}."
                )
            with torch.no_grad():
                parameter.copy_(saved)
        self.optimizer.load_state_tensors(checkpoint.tensors["optimizer"])
        self.step, self.tokens = checkpoint.step, checkpoint.state["tokens"]
        self.began_s = time.monotonic() - checkpoint.state["seconds"]
        restore_random_state(checkpoint.state["random"])

    def save_result(self) -> Path:
        """Writes the adapter, or the whole model, and its tokenizer; returns the folder."""
        config = self.config
        folder = self.run.adapter_path if config.train.method == "lora" else self.run.folder / "model"
        folder.mkdir(exist_ok=True)
        if config.train.method == "lora":
            save_adapter(self.model, folder, self.lora, self.base)
        else:
            save_model(self.model, folder)
        self.tokenizer.save(folder)
        return folder


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
    "stopped"; before it, SIGINT is a KeyboardInterrupt. Where no step was taken, an error leaves no folder.
    """
    config = pin_model(config, resume=resume)
    run = Run.resume(config.output.folder, config) if resume else Run.create(config.output.folder, config)
    checkpoint, skipped = run.latest_checkpoint() if resume else (None, [])
    for reason in skipped:
        print(f"Skipped a damaged checkpoint: {reason}", file=sys.stderr)
    if skipped and checkpoint is None:
        raise CheckpointError(f"{run.folder}: no checkpoint is whole. Start anew in another output.folder.")
    trainer = None
    try:
        trainer = prepare(config, run, checkpoint)
        if resume:
            run.rewind(trainer.step if checkpoint else -1)
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
    return (
        f"model    {config.model.path} · {model.spec.name}{held} · {model.dtype} on {model.device}\n"
        f"learns   {how}: {learned:,} parameters\n"
        f"data     {packed.examples:,} examples in {len(packed.rows):,} rows of {packed.length}, "
        f"{packed.efficiency:.0%} full, {packed.counted:,} of {packed.tokens:,} tokens learned{cut}\n"
        f"steps    {trainer.step:,} to {trainer.steps:,}, {rows} rows each\n"
        f"{trainer.speed.line}folder   {trainer.run.folder}"
    )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


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
    folder = summary["folder"]
    if done := summary["status"] == "done":
        print(f"done: {summary['result']}\n  python -m lumen.chat {folder}", file=sys.stderr)
        print(f"  python -m lumen.export {folder} OUT --as gguf --quant q8_0", file=sys.stderr)
    else:
        print(f"stopped after step {summary['steps']}, everything saved:", file=sys.stderr)
        print(f"  python -m lumen.train {folder} --resume", file=sys.stderr)
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
