"""A model continues prompts: one pass over the prompts, then one token a row and step from the cached keys and values.

Prompts of unequal length stand in one batch with padding on their left, so that all rows end and grow at the same
place. Padding is document -1, the rest document 0, and positions count from the first real token: a row attends to what
it would attend to alone, and greedy answers are those of each prompt by itself.

The next token of a row comes from softmax(logits / temperature) after three cuts, in this order, each on what the one
before left (Fan et al. 2018; Holtzman et al. 2019; Nguyen et al. 2024):

    top_k   the k likeliest tokens
    top_p   the likeliest tokens that together have at least the probability p
    min_p   the tokens at least min_p times as likely as the likeliest one
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lumen.data.batch import PADDING
from lumen.errors import ConfigError
from lumen.models.decoder import Decoder
from lumen.nn.cache import KVCache


@dataclass(frozen=True, kw_only=True)
class Generation:
    """The continuation of one prompt."""

    ids: list[int]  # without the prompt; a stop token is the last
    finish: Literal["stop", "length"]  # a stop token came, or max_tokens or the model's context was used up


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    stop_ids: Collection[int],
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    on_token: Callable[[int, int], None] | None = None,
) -> list[Generation]:
    """The continuation of each prompt, in their order.

    max_tokens   the most tokens that a prompt is continued by; fewer where the model's context ends before
    stop_ids     tokens that end a row
    temperature  0 takes the likeliest token, and the three cuts and the seed have no part in it
    top_k, top_p, min_p  0, 1 and 0 cut nothing
    seed         of a random generator of this call's own; the global random state is left alone
    on_token     called with (row, token) as each token comes, the stop token included

    Changes nothing in the model, whose dropout is off meanwhile. ConfigError for a prompt that is empty, that fills the
    model's context or that holds an id the model does not have, and for an option outside its range.
    """
    check_options(max_tokens, temperature, top_k, top_p, min_p, seed)
    if not prompts:
        return []
    room = [min(max_tokens, _room(model, number, prompt)) for number, prompt in enumerate(prompts, 1)]
    random = torch.Generator(model.device).manual_seed(seed)
    answers: list[list[int]] = [[] for _ in prompts]
    finish: list[Literal["stop", "length"] | None] = [None] * len(prompts)
    with _no_training(model):
        tokens, positions, document = (
            tensor if tensor is None else tensor.to(model.device) for tensor in _left_padded(prompts)
        )
        capacity = tokens.shape[1] + max(room) - 1  # the last token is never read
        cache = KVCache(model.spec, len(prompts), capacity, model.dtype, model.device)
        while not all(finish):
            logits = model.logits(model(tokens, positions, document, cache)[:, -1])  # (B, V)
            chosen = choose(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, random=random)
            for row, token in enumerate(chosen.tolist()):
                if finish[row]:
                    continue  # it goes on beside the others, and nobody listens
                answers[row].append(token)
                if token in stop_ids:
                    finish[row] = "stop"
                elif len(answers[row]) == room[row]:
                    finish[row] = "length"
                if on_token:
                    on_token(row, token)
            tokens, positions = chosen[:, None], positions[:, -1:] + 1  # (B, 1)
            document = None  # what is generated belongs to document 0
    return [Generation(ids=ids, finish=how) for ids, how in zip(answers, finish, strict=True)]


def check_options(max_tokens: int, temperature: float, top_k: int, top_p: float, min_p: float, seed: int) -> None:
    """ConfigError for an option of `generate` outside its range; before a large model is loaded, say."""
    ranges = [
        ("max_tokens", max_tokens, max_tokens >= 1, "at least 1"),
        ("temperature", temperature, 0 <= temperature < float("inf"), "0 or more"),
        ("top_k", top_k, top_k >= 0, "0 or more"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1"),
        ("min_p", min_p, 0 <= min_p <= 1, "between 0 and 1"),
        ("seed", seed, 0 <= seed < 2**63, "0 or more and below 2^63"),
    ]
    for name, value, holds, wanted in ranges:
        if not holds:
            raise ConfigError(f"{name} must be {wanted}, found {value}.")


def choose(
    logits: Tensor, *, temperature: float, top_k: int, top_p: float, min_p: float, random: torch.Generator
) -> Tensor:
    """One token a row, (B,) int64, of fp32 `logits` (B, V); advances `random` unless the temperature is 0."""
    if temperature == 0:
        return logits.argmax(-1)
    # Relative to the largest logit, so that a tiny temperature divides nothing up to infinity.
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    probabilities = cut(logits, top_k, top_p, min_p).softmax(-1)
    return torch.multinomial(probabilities, 1, generator=random).squeeze(1)


def cut(logits: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """`logits` (B, V) with -inf at the tokens that the three cuts leave out; the likeliest token always stays."""
    if top_k:
        smallest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1:
        probabilities, order = logits.softmax(-1).sort(dim=-1, descending=True)
        before = probabilities.cumsum(-1) - probabilities  # what the likelier tokens have together
        before[:, 0] = 0
        logits = logits.masked_fill((before >= top_p).scatter(1, order, before >= top_p), -torch.inf)
    if min_p:
        probabilities = logits.softmax(-1)
        logits = logits.masked_fill(probabilities < min_p * probabilities.amax(-1, keepdim=True), -torch.inf)
    return logits


def _left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tokens, positions and documents (B, T) of the prompts, ending at the right edge; documents only with padding."""
    T = max(len(prompt) for prompt in prompts)
    tokens, positions = torch.zeros(2, len(prompts), T, dtype=torch.int64)
    document = torch.full((len(prompts), T), PADDING)
    for row, prompt in enumerate(prompts):
        start = T - len(prompt)
        tokens[row, start:] = torch.tensor(prompt)
        positions[row, start:] = torch.arange(len(prompt))
        document[row, start:] = 0
    return tokens, positions, document if (document == PADDING).any() else None


@contextmanager
def _no_training(model: Decoder) -> Iterator[None]:
    """Without gradients and dropout; the model's mode is restored.

    Not `inference_mode`: tensors that a module keeps from inside it could take no part in a later training step.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _room(model: Decoder, number: int, prompt: Sequence[int]) -> int:
    """How many tokens fit behind a prompt."""
    context, vocab = model.spec.context_length, model.spec.vocab
    if not prompt:
        raise ConfigError(f"Prompt {number} is empty: a model needs at least one token to continue, as its BOS.")
    if len(prompt) >= context:
        raise ConfigError(
            f"Prompt {number} has {len(prompt)} tokens and leaves no room for an answer: "
            f"this model's context is {context} tokens. Shorten it, or begin a new conversation."
        )
    if strange := [token for token in prompt if not 0 <= token < vocab]:
        raise ConfigError(
            f"Prompt {number} holds token {strange[0]}, but the model has the tokens 0 to {vocab - 1}. "
            "Do the tokenizer and the model belong together?"
        )
    return context - len(prompt)
