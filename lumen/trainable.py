"""What of a model learns in a run, and the optimizer that moves it."""

from dataclasses import replace

from torch.nn import Parameter

from lumen.adapter import attach_lora, continue_settings, learn_modules, load_adapter
from lumen.config import Lora, RunConfig
from lumen.embeddings import ROLES, fill_rows
from lumen.models.decoder import Decoder
from lumen.objectives.examples import Examples
from lumen.optim import AdamW
from lumen.plan import LARGE
from lumen.text.added_tokens import spelled_before


def make_trainable(model: Decoder, config: RunConfig, examples: Examples) -> Lora:
    """Attaches a new adapter or the one that is trained further, or lets every weight learn; and gives added tokens
    their rows. In place; returns the settings of the adapter."""
    lora, begun = config.lora, examples.source.adapter
    if begun:
        lora = continue_settings(lora, load_adapter(model, begun, lora.dropout), begun)
    if config.tokens.add:
        before = examples.before
        by_mean = config.tokens.init == "mean"
        spelled = spelled_before(before, config.tokens.add)
        known = [id for id, token in enumerate(before.tokens) if token is not None]
        fill_rows(model, {id: [] if by_mean else ids for id, ids in spelled.items()}, known)
        lora = replace(lora, modules_to_save=ROLES)
    if config.train.method == "full":
        model.requires_grad_(True)
    elif begun:
        learn_modules(model, lora.modules_to_save)
    else:
        attach_lora(model, lora)
    return lora


def make_optimizer(model: Decoder, config: RunConfig) -> AdamW:
    train = config.train
    parameters: list[tuple[str, Parameter]] = list(model.named_parameters())
    options = {name: getattr(train, name) for name in ("beta1", "beta2", "eps", "weight_decay")}
    learned = sum(parameter.numel() for _, parameter in parameters if parameter.requires_grad)
    packs = train.optimizer_bits == 8 or (
        train.optimizer_bits == "auto" and model.device.type == "cuda" and learned >= LARGE and train.method == "lora"
    )
    options["bits"], options["paged"] = 8 if packs else 32, train.optimizer_paged
    rates = {f"{role}.weight": train.embedding_lr / train.lr for role in ROLES} if train.embedding_lr else {}
    return AdamW(parameters, **options, rates=rates)
