"""The gated MLP of a block, x + down(f(gate(n)) · up(n)) with n = norm(x), as two groups of `ops/project.py`.

Between the two lie the widest tensors of a model, gate and up (N, F). The first group may `leave` the updates of their
low-rank pairs out of them; they are `left` to the second, whose kernels add them to what they read anyway, forward and
backward (`ops/gated_waist.py`): no pair has a pass of its own over gate, up, h or their gradients. Where a group cannot
do that, as with dropout, gate and up hold their updates as the outputs of any layer do.
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
    learns = isinstance(down.weight, Tensor) and down.weight.requires_grad
    kernels = down.fp8 is None or down.magnitude is None  # else `project` runs the reference, which adds nothing left
    takes = down.a is None or (len(down.a) <= MOST_WAIST and not down.dropout and kernels)
    leave = takes and not learns
    normed = {} if norm is None else {"norm": norm, "eps": eps, "plus_one": plus_one}
    found = project(inward, x, **normed, leave=leave)
    gate, up, x = found[0], found[1], x if norm is None else found[2]
    left = found[-1] if leave else None
    return project([down], gate, up=up, kind=kind, residual=x if add else None, dead=dead, left=left)[0], x
