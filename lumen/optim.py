"""AdamW with decoupled weight decay, the clipping of gradients before it, and the learning rate of every step.

    m ← β₁ m + (1 - β₁) g                        the mean of the gradients
    v ← β₂ v + (1 - β₂) g²                       the mean of their squares
    p ← (1 - lr · decay) p                       matrices only: norms and biases do not belong near zero
    p ← p - lr · (m / (1 - β₁ᵗ)) / (√(v / (1 - β₂ᵗ)) + ε)

After Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (arXiv 1711.05101): decay is a shrinking of the
parameter and never passes through m and v. t counts the updates of a parameter, so one that first gets a gradient at
step 1000 (an encoder, when the first image comes) starts its averages there. Nothing here waits for the device.
"""

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import Parameter

from lumen.errors import CheckpointError, ConfigError, closest
from lumen.memory import OF_WEIGHTS, memory_told
from lumen.ops.adamw import Averages, Moments, adamw

LEAST_PACKED = 4096  # values: of smaller parameters eight bits would save nothing that counts


class AdamW:
    """Updates the parameters that learn, in place, from their `.grad`.

    bits  32: two fp32 averages of each parameter's shape. 8: one byte a value for each of the two (`ops/adamw.py`), for
          parameters of 4096 values and more; smaller ones stay in fp32
    paged the averages of parameters on a GPU lie in pinned host memory, and no byte of them on the device: the update
          reads and writes them over the bus, for 2.03 bytes a value each way in 8 bits, 8 in fp32 (`ops/adamw.py`).
          Bit for bit the same; on a CPU it is nothing
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Parameter]],
        *,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        rates: Mapping[str, float] = MappingProxyType({}),
        bits: int = 32,
        paged: bool = False,
    ):
        """Takes `model.named_parameters()` and keeps those that require a gradient; a ConfigError if none does.

        rates  by name, what a parameter's learning rate is as a multiple of `step`'s; 1 for those not named

        A parameter in bf16 or fp16 is updated from fp32 arithmetic and rounded: small steps may be lost to rounding.
        """
        self.parameters = {name: parameter for name, parameter in named_parameters if parameter.requires_grad}
        if not self.parameters:
            raise ConfigError(
                "The optimizer found no parameter that learns. Does lora.targets name layers of this model?"
            )
        self.beta1, self.beta2, self.eps, self.weight_decay = beta1, beta2, eps, weight_decay
        self.bits, self.paged = bits, paged
        self.states = {name: self._fresh_state(parameter) for name, parameter in self.parameters.items()}
        self.updates = dict.fromkeys(self.parameters, 0)  # t of the equation
        self.rates = {name: rates.get(name, 1.0) for name in self.parameters}

    def _fresh_state(self, parameter: Parameter) -> Averages | Moments:
        kind = Moments if self.bits == 8 and parameter.numel() >= LEAST_PACKED else Averages
        return kind.zeros(parameter.detach(), paged=self.paged)

    @memory_told("an update by AdamW", OF_WEIGHTS)
    @torch.no_grad()
    def step(self, lr: float, factor: Tensor | None = None) -> None:
        """One update with learning rate `lr`. A parameter without a gradient keeps its value and its state.

        factor  fp32 scalar on the parameters' device that multiplies every gradient; where it is not finite nothing
                moves, and nobody waits to find that out
        """
        names = [name for name, parameter in self.parameters.items() if parameter.grad is not None]
        if factor is None:
            factor = torch.ones((), device=next(iter(self.parameters.values())).device)
        for name in names:
            self.updates[name] += 1
        for kind in (Averages, Moments):
            if chosen := [name for name in names if isinstance(self.states[name], kind)]:
                self._update(chosen, lr, factor)

    def _update(self, names: list[str], lr: float, factor: Tensor) -> None:
        parameters = [self.parameters[name] for name in names]
        matrices = [parameter.ndim >= 2 for parameter in parameters]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters],
            [self.states[name] for name in names],
            beta1=self.beta1,
            beta2=self.beta2,
            eps=self.eps,
            rates=[lr * self.rates[name] / (1 - self.beta1 ** self.updates[name]) for name in names],
            corrections=[math.sqrt(1 - self.beta2 ** self.updates[name]) for name in names],
            decays=[
                lr * self.rates[name] * self.weight_decay * is_matrix
                for name, is_matrix in zip(names, matrices, strict=True)
            ],
            factor=factor,
        )

    def zero_grad(self) -> None:
        """Forgets the gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    @property
    def state_bytes(self) -> int:
        return sum(tensor.nbytes for state in self.states.values() for tensor in vars(state).values())

    def state_tensors(self) -> dict[str, Tensor]:
        """All that an exact resume needs: `mean.NAME`, `square.NAME`, their scales, `updates.NAME`; not copies.

        Of paged averages it waits until the last update has written them; they are the next one's to change.
        """
        if self.paged:
            for device in {parameter.device for parameter in self.parameters.values() if parameter.is_cuda}:
                torch.cuda.synchronize(device)
        parts = ((name, part, tensor) for name, state in self.states.items() for part, tensor in vars(state).items())
        state = {f"{part}.{name}": tensor for name, part, tensor in parts}
        return state | {f"updates.{name}": torch.tensor(count) for name, count in self.updates.items()}

    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        """Copies what `state_tensors` returned into this optimizer, or changes nothing and raises a CheckpointError."""
        own = self.state_tensors()
        for name in [*(own.keys() - state.keys()), *(state.keys() - own.keys())]:
            side = "lacks" if name in own else "has, and this run does not know,"
            raise CheckpointError(
                f"The optimizer state {side} {name!r}. Do lora.targets and train.method agree with it?"
            )
        for name, tensor in own.items():
            if tensor.shape != state[name].shape or tensor.dtype != state[name].dtype:
                raise CheckpointError(
                    f"The optimizer state {name!r} wants {tensor.dtype} of shape {tuple(tensor.shape)}, found "
                    f"{state[name].dtype} of {tuple(state[name].shape)}. Are lora.rank and train.optimizer_bits those "
                    "it was saved with?"
                )
        for name, tensor in own.items():
            if not name.startswith("updates."):
                tensor.copy_(state[name])
        self.updates = {name: int(state[f"updates.{name}"]) for name in self.parameters}


@torch.no_grad()
def gradient_norm(parameters: Iterable[Parameter]) -> Tensor:
    """The common norm of all gradients, an fp32 scalar on the device: reading it waits, this function does not."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(())
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)))


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """What gradients of this `norm` are multiplied by so that it is at most `max_norm`; 1 for a `max_norm` of 0.

    NaN for a norm that is not finite, under which an optimizer moves nothing.
    """
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0) if max_norm else torch.ones_like(norm)
    return factor + norm * 0


SCHEDULES = {  # what is left of the learning rate when `progress`, 0 ... 1, of the steps after the warm-up are done
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "constant": lambda progress: 1.0,
}


def learning_rate(
    step: int, total: int, *, lr: float, schedule: str, warmup_steps: int, warmup_fraction: float
) -> float:
    """The learning rate of update `step`, 0 ... total - 1: a rise to `lr` over the warm-up, then down to 0 at `total`.

    The warm-up lasts `warmup_steps`, or if that is 0 the `warmup_fraction` of `total`, rounded up. Its first update has
    a rate of 0, as in transformers' schedules, which these equal but for this: a fraction leaves one update after the
    warm-up, so that a run of a single update learns. An unknown schedule is a ConfigError.
    """
    if schedule not in SCHEDULES:
        known = ", ".join(SCHEDULES)
        raise ConfigError(f"train.schedule: unknown {schedule!r}.{closest(schedule, SCHEDULES)} Known are {known}.")
    warmup = warmup_steps or min(math.ceil(total * warmup_fraction), total - 1)
    if step < warmup:
        return lr * step / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return lr * SCHEDULES[schedule](min(1.0, progress))
