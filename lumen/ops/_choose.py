"""Which implementation of an operation runs, and why.

An operation with more than one implementation asks `choice(op, available)`, where `available` maps the implementations
that are exact for this call, best first, to the reason for taking them. `ops.use("reference")` forces one inside a
`with`; what was last chosen, and why, is what `ops.explain()` returns. An implementation that was forced and cannot
serve is an error, never a silent other one.

Every operation that may launch kernels is `uncompiled`: torch.compile leaves it as it is.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps

import torch

from lumen.errors import KernelError

# not a context variable: backward passes run in threads of autograd's own, which see no context
_forced: list[tuple[str, tuple[str, ...]]] = []
_last: dict[str, tuple[str, str]] = {}
_outsides: dict[Callable, Callable] = {}  # a function → what torch.compile does not look into


@contextmanager
def use(implementation: str, *ops: str) -> Iterator[None]:
    """Inside the `with`, the named operations run `implementation`, as "reference"; none named: all with a choice."""
    _forced.append((implementation, ops))
    try:
        yield
    finally:
        _forced.pop()


def explain() -> dict[str, str]:
    """Operation → "implementation: reason", for every operation with a choice that has run in this process."""
    return {op: f"{name}: {reason}" for op, (name, reason) in sorted(_last.items())}


def choice(op: str, available: dict[str, str]) -> str:
    """The implementation to run: the forced one, else the first of `available` (name → reason, best first)."""
    name = forced(op)
    if name is None:
        name = next(iter(available))
        _last[op] = (name, available[name])
    elif name in available:
        _last[op] = (name, "forced by ops.use")
    else:
        raise KernelError(f"{op}: {name!r} was forced, but only {', '.join(available)} can serve this call.")
    return name


def forced(op: str) -> str | None:
    """The implementation of the operation that the innermost `use` forces, if it does."""
    name, ops = _forced[-1] if _forced else (None, ())
    return name if not ops or op in ops else None


def uncompiled(function: Callable) -> Callable:
    """`function` for torch.compile to call and not to look into: the graph breaks there, and goes on behind it.

    What it would find is compiled already, and no part of a graph: buffers that are used again, tensors turned where
    they lie, weights known by identity, of which each would be a graph of its own.
    """

    @wraps(function)
    def call(*arguments, **options):
        if "torch._dynamo" not in sys.modules:  # nobody compiles, and importing it takes a second
            return function(*arguments, **options)
        if function not in _outsides:
            torch._dynamo.decorators.skip(call)  # the few lines here are no graph either
            _outsides[function] = torch.compiler.disable(function, reason="its kernels are compiled already")
        return _outsides[function](*arguments, **options)

    call._torchdynamo_disable = True  # as torch.compiler.disable marks what it returns
    return call
