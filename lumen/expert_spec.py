"""The sparse layers of a model: what a page says of experts, bound to one `config.json`.

What the numbers mean stands in `nn/experts.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from lumen.errors import SpecError
from lumen.page import ExpertsPage, Number, lookup

EXACT = ("mlp.router", "mlp.shared_gate")  # roles that stay in fp32: never packed, never adapted
SIZES = {"experts": "count", "experts_per_token": "per_token", "expert_dim": "width", "shared_dim": "shared"}


@dataclass(frozen=True, kw_only=True)
class ExpertsSpec:
    """The experts of one sparse layer; all sparse layers of a model are alike."""

    count: int  # X
    per_token: int
    width: int  # inner width of one
    normalize: bool
    shared: int  # inner width of the shared one; 0 = there is none
    shared_gate: str

    def shapes(self, dim: int) -> dict[str, tuple[int, ...]]:
        """Role inside a block → shape, of the weights that stand in the place of an MLP's."""
        shapes: dict[str, tuple[int, ...]] = {
            "mlp.router": (self.count, dim),
            "mlp.experts.gate": (self.count, self.width, dim),
            "mlp.experts.up": (self.count, self.width, dim),
            "mlp.experts.down": (self.count, dim, self.width),
        }
        if self.shared:
            wide, narrow = (self.shared, dim), (dim, self.shared)
            shapes |= {"mlp.shared.gate": wide, "mlp.shared.up": wide, "mlp.shared.down": narrow}
        if self.shared_gate != "none":
            shapes["mlp.shared_gate"] = (1, dim)
        return shapes


def bind_experts(page: ExpertsPage, config: dict, where: str, number: Callable[[str, Number], float]) -> ExpertsSpec:
    """The page's `[experts]` with the numbers of one checkpoint; `number` resolves a number of the page.

    SpecError for sizes that no layer of experts can have.
    """
    sizes = {name: int(number(f"experts.{name}", getattr(page, name))) for name in SIZES.values()}
    normalize = lookup(config, page.normalize) if isinstance(page.normalize, str) else page.normalize
    if not isinstance(normalize, bool):
        raise SpecError(f"{where}: {page.normalize} wants true or false, found {normalize!r}.")
    if not 1 <= sizes["per_token"] <= sizes["count"]:
        raise SpecError(
            f"{where}: {page.per_token} wants a number of experts from 1 to the {sizes['count']} that there are, "
            f"found {sizes['per_token']}."
        )
    if sizes["width"] < 1 or sizes["shared"] < 0:
        widths = f"{sizes['width']}, and {sizes['shared']} for the shared one"
        raise SpecError(f"{where}: experts want a positive width, found {widths}.")
    return ExpertsSpec(**sizes, normalize=normalize, shared_gate=page.shared_gate)


def sparse_layers(
    page: ExpertsPage, config: dict, where: str, number: Callable[[str, Number], float], depth: int
) -> set[int]:
    """The layers that have experts: every `step`th, without those that config.json lists under the page's `dense`."""
    step, dense = int(number("experts.step", page.step)), lookup(config, page.dense) if page.dense else None
    dense = [] if dense is None else dense
    if step < 1:
        raise SpecError(f"{where}: {page.step} wants a step of at least 1 layer, found {step}.")
    if not isinstance(dense, list) or not all(type(layer) is int and 0 <= layer < depth for layer in dense):
        raise SpecError(f"{where}: {page.dense} wants a list of layers from 0 to {depth - 1}, found {dense!r}.")
    return set(range(step - 1, depth, step)) - set(dense)


def size_keys(page: ExpertsPage) -> dict[str, str]:
    """The words of a page's `[sizes]` that are about experts → the keys of config.json that hold the same."""
    named = {word: getattr(page, name) for word, name in SIZES.items()}
    firsts = {word: key[0] if isinstance(key, list) else key for word, key in named.items()}
    return {word: key for word, key in firsts.items() if isinstance(key, str)}
