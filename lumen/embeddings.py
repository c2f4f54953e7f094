"""The two matrices with a row for each token, embedding and head: learned whole, untied, filled for new tokens.

A matrix that learns is an fp32 master, and the weight it replaces stays beside it as the buffer `base`, so that the
model can still be asked what it said before. A tied head is the embedding: one matrix under two roles.

New tokens get the mean of trained rows, or that of the tokens which spelled them before. A row is trained when a token
has it and something in it is larger than 1e-16: rows that were reserved and never met in pretraining are that small
(those of Llama 3's reserved tokens), and would pull a mean towards zero.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lumen.errors import ConfigError
from lumen.models.decoder import Decoder
from lumen.nn.linear import Linear

ROLES = ("embed", "head")
UNTRAINED = 1e-16  # the largest value in a row that no training has touched


def matrix(model: Decoder, role: str) -> nn.Module:
    """The module of "embed" or "head"; the embedding for a head that is tied to it."""
    return model.embed if role == "embed" or model.head is None else model.head


def base_of(module: nn.Module) -> Tensor | None:
    """The weight that a learned one replaces; None where nothing learns."""
    return dict(module.named_buffers(recurse=False)).get("base")


def learned_whole(model: Decoder) -> dict[str, nn.Module]:
    """Role → module, of those that `learn_whole` was called for; a tied head is not named."""
    roles = ROLES if model.head is not None else ROLES[:1]
    return {role: matrix(model, role) for role in roles if base_of(matrix(model, role)) is not None}


def learn_whole(model: Decoder, role: str, values: Tensor | None = None) -> None:
    """Lets a matrix learn, from `values` (V, D), else from where it stands; in place.

    Values with more or fewer rows than the matrix resize it, and `base` with it: rows that the base never had are those
    of `values`. The caller sees to it that embedding and head end with the same number, and `spec` with them.
    """
    module = matrix(model, role)
    base = base_of(module)
    base = module.weight.detach() if base is None else base
    values = module.weight.detach() if values is None else values.to(base.device)
    module.register_buffer("base", torch.cat([base[: len(values)], values[len(base) :].to(base.dtype)]), False)
    module.weight = nn.Parameter(values.to(torch.float32, copy=True))


def untie(model: Decoder) -> None:
    """Gives a tied model a head of its own, equal to the embedding as it was before anything was learned; in place."""
    with torch.device("meta"):
        head = Linear(model.spec.dim, model.spec.vocab)
    base = base_of(model.embed)
    head.weight = nn.Parameter(model.embed.weight.detach() if base is None else base, requires_grad=False)
    model.head = head
    model.spec = replace(model.spec, tied=False, config=model.spec.config | {"tie_word_embeddings": False})


def set_vocabulary(model: Decoder, rows: int) -> None:
    """Makes `spec` and its config.json say how many rows the matrices have."""
    model.spec = replace(model.spec, vocab=rows, config=model.spec.config | {"vocab_size": rows})


@torch.no_grad()
def fill_rows(model: Decoder, sources: Mapping[int, Sequence[int]], known: Sequence[int]) -> None:
    """Gives tokens new rows in embedding and head, in place; both grow where a token has no row yet.

    sources  token → the tokens whose rows it takes the mean of; an empty list takes all trained rows
    known    the tokens that there were before; other rows are padding, and nothing is learned from them

    ConfigError where no source is trained.
    """
    rows = max(model.spec.vocab, *(token + 1 for token in sources))
    modules = {id(module): module for module in (matrix(model, role) for role in ROLES)}.values()
    # a token that the model never read is none that it ever said: the embedding decides for both
    trained = torch.stack([module.weight.abs().amax(1) > UNTRAINED for module in modules]).all(0)
    trained &= torch.zeros_like(trained).index_fill_(0, torch.tensor(known, device=trained.device), True)
    for module in modules:
        filled = _grown(module.weight, rows)
        for token, wanted in sources.items():
            chosen = torch.tensor([source for source in wanted if trained[source]], device=filled.device)
            chosen = chosen if wanted else trained.nonzero().squeeze(1)
            if not len(chosen):
                raise ConfigError(
                    f"tokens.init: none of the rows that token {token} would begin from is trained. Take init=mean."
                )
            filled[token] = module.weight[chosen].float().mean(0)
        if base_of(module) is not None:
            base = _grown(base_of(module), rows)
            base[list(sources)] = filled[list(sources)].to(base.dtype)
            module.base = base
        module.weight = nn.Parameter(filled, requires_grad=module.weight.requires_grad)
    set_vocabulary(model, rows)


def _grown(weight: Tensor, rows: int) -> Tensor:
    """A copy with as many rows; new ones are zero."""
    grown = weight.new_zeros(rows, weight.shape[1])
    grown[: len(weight)] = weight
    return grown
