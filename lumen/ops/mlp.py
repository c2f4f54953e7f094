"""The gated MLP of a block, x + down(f(gate(n)) · up(n)) with n = norm(x), as two groups of `ops/project.py`.

Between the two lie the widest tensors of a model, gate and up (N, F). The updates of their low-rank pairs are left out
of them, and added by the kernels that read them anyway (`ops/gated_waist.py`), forward and backward.
"""

from collections.abc import Sequence

from torch import Tensor

from lumen.ops._choose import uncompiled
from lumen.ops.pairs import MOST_WAIST
from lumen.ops.project import Projection, project


@uncompiled
def mlp(
    inward: Sequence[Projection],
    down: Projection,
    x: Tensor,
    kind: str,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    plus_one: bool = False,
    add: bool = False,
    dead: bool = False,
) -> tuple[Tensor, Tensor]:
    """(down(f(gate(n)) · up(n)), x), both (…, D): what goes on from here instead of from x is the second.

    inward  gate and up; n is norm(x), or x itself without `norm`
    kind    f, a key of `gated.ACTIVATIONS`
    add     the first of the results has x added
    dead    as in `project`, of the output of `down`
    """
    takes = down.a is None or (len(down.a) <= MOST_WAIST and not down.dropout)
    leave = takes and not (isinstance(down.weight, Tensor) and down.weight.requires_grad)
    normed = {} if norm is None else {"norm": norm, "eps": eps, "plus_one": plus_one}
    found = project(inward, x, **normed, leave=leave)
    gate, up, x = found[0], found[1], x if norm is None else found[2]
    left = found[-1] if leave else None
    return project([down], gate, up=up, kind=kind, residual=x if add else None, dead=dead, left=left)[0], x
