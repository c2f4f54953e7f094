"""The training loop: `Trainer.train` takes a run from where it stands to its end, step by step, and keeps its folder.

A step is `accumulate` batches, whose gradients are summed (`capture.py`), one norm, and one update of the optimizer. On
a GPU nothing in it waits for the device: what an update measured is read while the next one runs.
"""

import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lumen.adapter import save_adapter
from lumen.capture import Passes
from lumen.checkpoint import save_model
from lumen.config import Lora, RunConfig
from lumen.data.batch import Batch
from lumen.data.packing import Packed
from lumen.errors import CheckpointError, ConfigError, LumenError
from lumen.memory import OF_A_PASS, memory_told
from lumen.models.decoder import Decoder
from lumen.objectives.base import Objective
from lumen.objectives.sft import mean_loss
from lumen.optim import AdamW, clip_factor, gradient_norm, learning_rate
from lumen.profile import peak_memory_bytes, recorded
from lumen.report import Progress
from lumen.run import Checkpoint, Run, StopSignal, random_state, restore_random_state
from lumen.sampling import generate
from lumen.speed import Speed
from lumen.text.tokenizer import Tokenizer
from lumen.text.turns import question_ids


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
                self.optimizer.zero_grad()
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
        """Puts weights, optimizer, counters and random states where `checkpoint` left them.

        ConfigError where the run is past its last step already.
        """
        if checkpoint.step > self.steps:
            raise ConfigError(
                f"{self.run.folder}: {checkpoint.step:,} steps are done already, and {self.steps:,} are asked for by "
                "train.steps or train.epochs. Ask for more, or start a new run by output.folder=…"
            )
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


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
