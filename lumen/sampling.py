"""A model continues prompts: the prompts are read in pieces, then one token a row and step follows from the cached keys
and values.

Reading and growing are `decoding.py`'s: a row attends to what it would attend to alone. Here each row has dice of its
own, so an answer is what its prompt would get by itself.

The next token of a row comes from softmax(logits / temperature), after the logits of tokens that the row already holds
were lowered (repetition_penalty, Keskar et al. 2019: divided by it where positive, multiplied where negative), and
after three cuts, in this order, each on what the one before left (Fan et al. 2018; Holtzman et al. 2019; Nguyen et al.
2024):

    top_k   the k likeliest tokens
    top_p   the likeliest tokens that together have at least the probability p
    min_p   the tokens at least min_p times as likely as the likeliest one

Which rows have ended, and their text, is kept in Python, beside the step.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import Literal

import torch
from torch import Tensor

from lumen.decoding import Decoding
from lumen.errors import ConfigError, LumenError
from lumen.models.decoder import Decoder
from lumen.spec import ModelSpec
from lumen.text.tokenizer import StreamDecoder, Tokenizer

Finish = Literal["stop", "length", "context"]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """The continuation of one prompt."""

    ids: list[int]  # without the prompt; a stop token, or the tokens that completed a stop string, are the last
    finish: Finish  # a stop token or string came; max_tokens did; the model's context is full
    text: str | None = None  # what the ids say, up to the stop; None where `generate` was given no tokenizer


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]] | Tensor,
    *,
    max_tokens: int,
    stop_ids: Collection[int],
    stop_strings: Collection[str] = (),
    tokenizer: Tokenizer | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    prefill_chunk: int = 2048,
    on_token: Callable[[int, int], None] | None = None,
    on_text: Callable[[int, str], None] | None = None,
) -> list[Generation]:
    """The continuation of each prompt, a list of token ids, in their order.

    max_tokens    the most tokens that a prompt is continued by; fewer where the model's context ends before
    stop_ids      tokens that end a row
    stop_strings  texts that end a row, wherever tokens begin and end; want the tokenizer. See `AnswerText`
    tokenizer     where it is given, answers have a text
    temperature   0 takes the likeliest token, and the three cuts and the seed have no part in it
    top_k, top_p, min_p, repetition_penalty  0, 1, 0 and 1 change nothing
    seed          row r draws from a generator of its own, seeded with seed + r; no global random state is touched
    prefill_chunk tokens of the prompts that are read at once: bounds the memory of long prompts, changes no answer
    on_token      called with (row, token) as each token comes, the stop token included
    on_text       called with (row, text) as text becomes certain; all pieces, joined, are the answer's text

    Changes nothing in the model, whose dropout is off meanwhile. ConfigError for a prompt that is empty, that fills the
    model's context or that holds an id the model does not have, and for an option outside its range. LumenError where
    the model's logits are no numbers.
    """
    cuts = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    sampling = {**cuts, "repetition_penalty": repetition_penalty, "seed": seed}
    check_options(**sampling, max_tokens=max_tokens, prefill_chunk=prefill_chunk)
    _check_stops(stop_strings, tokenizer, on_text)
    prompts = prompts.tolist() if isinstance(prompts, Tensor) else prompts
    room = [_room(model.spec, number, prompt) for number, prompt in enumerate(prompts, 1)]
    if not prompts:
        return []
    rows = [_Row(max_tokens, left, stop_ids, stop_strings, tokenizer) for left in room]
    with _no_training(model):
        sampler = _Sampler(model, prompts, **sampling)
        decoding = Decoding(model, prompts, max(row.room for row in rows), prefill_chunk)
        logits = decoding.read()
        while True:
            chosen = sampler(logits)
            tokens = chosen.tolist()
            for number, (row, token) in enumerate(zip(rows, tokens, strict=True)):
                row.take(number, token, on_token, on_text)
            if all(row.finish for row in rows):
                return [Generation(ids=row.ids, finish=row.finish, text=row.said) for row in rows]
            logits = decoding.step(chosen, tokens)


def check_options(
    *,
    max_tokens: int = 1,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    prefill_chunk: int = 1,
) -> None:
    """ConfigError for an option of `generate` outside its range; before a large model is loaded, say."""
    ranges = [
        ("max_tokens", max_tokens, max_tokens >= 1, "at least 1"),
        ("temperature", temperature, 0 <= temperature < float("inf"), "0 or more"),
        ("top_k", top_k, top_k >= 0, "0 or more"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1"),
        ("min_p", min_p, 0 <= min_p <= 1, "between 0 and 1"),
        ("repetition_penalty", repetition_penalty, 0 < repetition_penalty < float("inf"), "above 0"),
        ("seed", seed, 0 <= seed < 2**62, "0 or more and below 2^62"),
        ("prefill_chunk", prefill_chunk, prefill_chunk >= 1, "at least 1"),
    ]
    for name, value, holds, wanted in ranges:
        if not holds:
            raise ConfigError(f"{name} must be {wanted}, found {value}.")


# --- the next token --------------------------------------------------------------------------------------------------


def choose(
    logits: Tensor, *, temperature: float, top_k: int, top_p: float, min_p: float, draws: Tensor | None
) -> Tensor:
    """One token a row, (B,) int64, of fp32 `logits` (B, V); -1 in a row whose logits are no numbers.

    draws  (B,) float64 in [0, 1): where in the probabilities, laid end to end in the order of the ids, a row's token
           lies; None will do where the temperature is 0
    """
    best = logits.amax(-1, keepdim=True)
    if temperature == 0:
        chosen = logits.argmax(-1)
    else:
        # Relative to the largest logit, so that a tiny temperature divides nothing up to infinity.
        ends = cut((logits - best) / temperature, top_k, top_p, min_p).softmax(-1).double().cumsum(-1)
        total = ends[:, -1:]
        # Short of the total, whatever was rounded: beyond it there are only tokens that a cut has left out.
        points = torch.minimum(draws[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
        chosen = torch.searchsorted(ends, points, right=True).squeeze(1)
    return chosen.where(best.isfinite().squeeze(1), -1)


def penalize(logits: Tensor, held: Tensor, penalty: float) -> Tensor:
    """`logits` (B, V), those of the tokens that `held` (B, V) bool marks made less likely by a penalty above 1."""
    return torch.where(held, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


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


class _Sampler:
    """Chooses the next token of every row, each with a generator of its own.

    The generators roll on the CPU, whatever the model runs on: the same seed rolls the same everywhere.
    """

    def __init__(
        self,
        model: Decoder,
        prompts: Sequence[Sequence[int]],
        *,
        seed: int,
        repetition_penalty: float,
        **options: float,
    ):
        self.options = options
        self.penalty = repetition_penalty
        self.dice = [torch.Generator().manual_seed(seed + row) for row in range(len(prompts))]
        if repetition_penalty != 1:
            held = torch.zeros(len(prompts), model.spec.vocab, dtype=torch.bool)
            for row, prompt in enumerate(prompts):
                held[row, list(prompt)] = True
            self.held = held.to(model.device)  # (B, V), the tokens that each row holds

    def __call__(self, logits: Tensor) -> Tensor:
        """One token a row, (B,) int64, of `logits` (B, V); as `choose` gives them."""
        if self.penalty != 1:
            logits = penalize(logits, self.held, self.penalty)
        draws = None
        if self.options["temperature"]:
            draws = torch.cat([torch.rand(1, generator=dice, dtype=torch.float64) for dice in self.dice])
            draws = draws.to(logits.device)
        chosen = choose(logits, **self.options, draws=draws)
        if self.penalty != 1:
            self.held.scatter_(1, chosen.clamp(min=0)[:, None], True)
        return chosen


# --- the text of an answer -------------------------------------------------------------------------------------------


class AnswerText:
    """What an answer says while its tokens come: whole characters, special tokens left out, up to a stop string.

    The text ends right before the stop string that is complete first (of several, the longest), as if it had come
    character by character. What may be the beginning of one is held back until that is decided.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Collection[str] = ()):
        self.text = ""  # all that was said
        self.stopped = False
        self._stream = StreamDecoder(tokenizer, skip_special=True)
        self._stops = tuple(stop_strings)
        self._waiting = ""

    def push(self, token: int) -> str:
        """The text that is certain after this token."""
        return self._say(self._stream.push(token))

    def flush(self) -> str:
        """What was held back, when no token comes any more."""
        return self._say(self._stream.flush(), final=True)

    def _say(self, text: str, *, final: bool = False) -> str:
        if self.stopped:
            return ""
        text = self._waiting + text
        found = [(text.find(stop) + len(stop), -len(stop)) for stop in self._stops if stop in text]
        if found:
            end, negative_length = min(found)
            certain, self._waiting = text[: end + negative_length], ""
            self.stopped = True
        else:
            split = len(text) - (0 if final else self._undecided(text))
            certain, self._waiting = text[:split], text[split:]
        self.text += certain
        return certain

    def _undecided(self, text: str) -> int:
        """Characters at the end of `text` that a stop string may begin with."""
        lengths = (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return max(lengths, default=0)


class _Row:
    """One answer while it grows."""

    def __init__(
        self,
        max_tokens: int,
        left: int,
        stop_ids: Collection[int],
        stop_strings: Collection[str],
        tokenizer: Tokenizer | None,
    ):
        self.ids: list[int] = []
        self.finish: Finish | None = None
        self.room = min(max_tokens, left)
        self._full: Finish = "length" if max_tokens <= left else "context"
        self._stop_ids = frozenset(stop_ids)
        self._text = None
        if tokenizer is not None:
            self._text = AnswerText(tokenizer, stop_strings)
            # A special token says nothing, so its name is never found in the text: it is the token that is meant.
            self._stop_ids |= {tokenizer.token_to_id(stop) for stop in stop_strings} & tokenizer.special_ids

    @property
    def said(self) -> str | None:
        return None if self._text is None else self._text.text

    def take(
        self,
        number: int,
        token: int,
        on_token: Callable[[int, int], None] | None,
        on_text: Callable[[int, str], None] | None,
    ) -> None:
        """Adds the row's next token; nothing where the row has ended: it goes on beside the others unheard."""
        if token < 0:
            raise LumenError(
                f"The model's logits for prompt {number + 1} are not numbers after {len(self.ids)} tokens: its weights "
                "are damaged or have diverged, or its dtype is too narrow for them. Try float32."
            )
        if self.finish:
            return
        self.ids.append(token)
        if on_token:
            on_token(number, token)
        piece = self._read(token)
        if piece and on_text:
            on_text(number, piece)

    def _read(self, token: int) -> str:
        """Decides whether the answer ends here; the text that is certain now."""
        stopped, piece = token in self._stop_ids, ""
        if self._text and not stopped:
            piece = self._text.push(token)
            stopped = self._text.stopped
        if stopped or len(self.ids) == self.room:
            self.finish = "stop" if stopped else self._full
            piece += self._text.flush() if self._text else ""
        return piece


# --- what generate asks for -------------------------------------------------------------------------------------------


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


def _check_stops(
    stop_strings: Collection[str], tokenizer: Tokenizer | None, on_text: Callable[[int, str], None] | None
) -> None:
    if isinstance(stop_strings, str) or "" in stop_strings:
        raise ConfigError(f"stop_strings wants a list of texts, none of them empty, found {stop_strings!r}.")
    if tokenizer is None and (stop_strings or on_text):
        raise ConfigError("Stop strings and on_text want the tokenizer that says what the ids mean.")


def _room(spec: ModelSpec, number: int, prompt: Sequence[int]) -> int:
    """How many tokens fit behind a prompt."""
    context, vocab = spec.context_length, spec.vocab
    if isinstance(prompt, Integral) or not all(isinstance(token, Integral) for token in prompt):
        raise ConfigError(
            f"Prompt {number}: wanted a list of token ids, found {prompt!r:.60}. "
            "lumen.question_ids(text, tokenizer) makes one of a text."
        )
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
