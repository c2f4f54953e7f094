"""AdamW with decoupled weight decay, the clipping of gradients before it, and the learning rate of every step.

    m ← β₁ m + (1 - β₁) g                        exp_avg, the mean of the gradients
    v ← β₂ v + (1 - β₂) g²                       exp_avg_sq, the mean of their squares
    p ← (1 - lr · decay) p                       matrices only: norms and biases do not belong near zero
    p ← p - lr · (m / (1 - β₁ᵗ)) / (√(v / (1 - β₂ᵗ)) + ε)

After Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (arXiv 1711.05101): decay is a shrinking of the
parameter and never passes through m and v. t counts the updates of a parameter, so one that first gets a gradient at
step 1000 (an encoder, when the first image comes) starts its averages there. Nothing here waits for the device.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import Parameter

from lumen.errors import CheckpointError, ConfigError, closest


class AdamW:
    """Updates the parameters that learn, in place, from their `.grad`; holds two fp32 tensors of each one's shape."""

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Parameter]],
        *,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
    ):
        """Takes `model.named_parameters()` and keeps those that require a gradient; a ConfigError if none does.

        A parameter in bf16 or fp16 is updated from fp32 arithmetic and rounded: small steps may be lost to rounding.
        """
        self.parameters = {name: parameter for name, parameter in named_parameters if parameter.requires_grad}
        if not self.parameters:
            raise ConfigError(
                "The optimizer found no parameter that learns. Does lora.targets name layers of this model?"
            )
        self.beta1, self.beta2, self.eps, self.weight_decay = beta1, beta2, eps, weight_decay
        self.exp_avg = {name: _zeros(parameter) for name, parameter in self.parameters.items()}
        self.exp_avg_sq = {name: _zeros(parameter) for name, parameter in self.parameters.items()}
        self.updates = dict.fromkeys(self.parameters, 0)  # t of the equation

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update with learning rate `lr`. A parameter without a gradient keeps its value and its state."""
        names = [name for name, parameter in self.parameters.items() if parameter.grad is not None]
        if not names:
            return
        for name in names:
            self.updates[name] += 1
        parameters = [self.parameters[name] for name in names]
        gradients = [parameter.grad.float() for parameter in parameters]
        mean = [self.exp_avg[name] for name in names]
        square = [self.exp_avg_sq[name] for name in names]

        torch._foreach_lerp_(mean, gradients, 1 - self.beta1)
        torch._foreach_mul_(square, self.beta2)
        torch._foreach_addcmul_(square, gradients, gradients, 1 - self.beta2)

        spread = torch._foreach_sqrt(square)
        torch._foreach_div_(spread, [math.sqrt(1 - self.beta2 ** self.updates[name]) for name in names])
        torch._foreach_add_(spread, self.eps)
        self._decay(parameters, lr)
        rates = [-lr / (1 - self.beta1 ** self.updates[name]) for name in names]
        torch._foreach_addcdiv_(parameters, mean, spread, rates)

    def zero_grad(self) -> None:
        """Forgets the gradients, and gives back their memory."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def state_tensors(self) -> dict[str, Tensor]:
        """All that an exact resume needs, by `exp_avg.NAME`, `exp_avg_sq.NAME` and `updates.NAME`; not copies."""
        state = {f"exp_avg.{name}": tensor for name, tensor in self.exp_avg.items()}
        state |= {f"exp_avg_sq.{name}": tensor for name, tensor in self.exp_avg_sq.items()}
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
            if tensor.shape != state[name].shape:
                raise CheckpointError(
                    f"The optimizer state {name!r} wants shape {tuple(tensor.shape)}, "
                    f"found {tuple(state[name].shape)}. Is lora.rank the one it was saved with?"
                )
        for name in self.parameters:
            self.exp_avg[name].copy_(state[f"exp_avg.{name}"])
            self.exp_avg_sq[name].copy_(state[f"exp_avg_sq.{name}"])
        self.updates = {name: int(state[f"updates.{name}"]) for name in self.parameters}

    def _decay(self, parameters: list[Parameter], lr: float) -> None:
        matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
        if self.weight_decay and matrices:
            torch._foreach_mul_(matrices, 1 - lr * self.weight_decay)


def _zeros(parameter: Parameter) -> Tensor:
    return torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)


@torch.no_grad()
def clip_gradients(parameters: Iterable[Parameter], max_norm: float) -> Tensor:
    """Scales all gradients in place so that their common norm is at most `max_norm`; 0 only measures.

    Returns the norm before scaling, an fp32 scalar on the device: reading it waits, this function does not. A norm that
    is not finite makes the gradients so; the caller looks before it steps.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(())
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)))
    if max_norm:
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


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
    a rate of 0, as in transformers' schedules, which these equal. An unknown schedule is a ConfigError.
    """
    if schedule not in SCHEDULES:
        known = ", ".join(SCHEDULES)
        raise ConfigError(f"train.schedule: unknown {schedule!r}.{closest(schedule, SCHEDULES)} Known are {known}.")
    warmup = warmup_steps or math.ceil(total * warmup_fraction)
    if step < warmup:
        return lr * step / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return lr * SCHEDULES[schedule](min(1.0, progress))
