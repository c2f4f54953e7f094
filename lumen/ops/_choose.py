"""Which implementation of an operation runs, and why.

An operation with more than one implementation asks `choice(op, available)`, where `available` maps the implementations
that are exact for this call, best first, to the reason for taking them. `ops.use("reference")` forces one inside a
`with`; what was last chosen, and why, is what `ops.explain()` returns. An implementation that was forced and cannot
serve is an error, never a silent other one.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from lumen.errors import KernelError

# not a context variable: backward passes run in threads of autograd's own, which see no context
_forced: list[tuple[str, tuple[str, ...]]] = []
_last: dict[str, tuple[str, str]] = {}


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
    forced, ops = _forced[-1] if _forced else (None, ())
    if forced is None or (ops and op not in ops):
        name = next(iter(available))
        _last[op] = (name, available[name])
    elif forced in available:
        name = forced
        _last[op] = (name, "forced by ops.use")
    else:
        raise KernelError(f"{op}: {forced!r} was forced, but only {', '.join(available)} can serve this call.")
    return name
