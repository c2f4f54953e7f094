"""The program that renders chat templates: a process of its own, because a template is a stranger's program.

jinja2's immutable sandbox keeps a template from touching Python; it does not keep it from running for an hour or from
filling the memory, and a check inside the same process comes too late for `{{ 'x' * 10 ** 10 }}`. So `template.py`
starts this file as a child, which limits its own memory, and kills it when the time is up.

Decision: one child for all templates of a process, spoken to by lines of JSON.
Because: only a process can be stopped inside one long operation, and starting one per rendering would cost 100 ms each.
Revisit when: rendering is what a training run waits for.

It imports jinja2 and the standard library only, so that it starts quickly. Protocol, one JSON object a line:
    request   {"source", "variables", "now": ISO date or null, "marks": bool, "output_limit": characters}
    reply     {"text", "spans": [[start, end], …]}  or  {"error": what went wrong}
"""

import json
import secrets
import sys
from datetime import datetime
from functools import lru_cache
from itertools import pairwise

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

MEMORY_LIMIT_BYTES = 1 << 30

# What a template can raise by being wrong; anything else ends the process, which the other side reports as well.
REFUSALS = (
    jinja2.TemplateError,  # its own raise_exception, syntax, undefined names, and the sandbox's SecurityError
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,  # and with it RecursionError
    TypeError,
    ValueError,
)


class Generation(Extension):
    """`{% generation %}…{% endgeneration %}`: the template's own statement of what the assistant wrote.

    While `environment.marks` is set, the block's text is put between the two marks; they survive where a position
    counted during rendering would not, as when the block stands inside `{% set %}`.
    """

    tags = frozenset({"generation"})

    def parse(self, parser: jinja2.parser.Parser) -> nodes.CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: jinja2.runtime.Macro) -> str:
        before, after = self.environment.marks or ("", "")
        return before + caller() + after


class Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, which hands out nothing in place of what is forbidden; here, asking for it is an error."""

    def unsafe_undefined(self, obj: object, attribute: str) -> jinja2.Undefined:
        raise SecurityError(f"{attribute!r} of {type(obj).__name__!r} is not a template's business")


def environment() -> Sandbox:
    """What templates on the hub are written for: transformers' blocks, filters and functions, and nothing beyond."""
    env = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, LoopControlExtension], cache_size=0)
    env.marks = None
    env.now = None
    del env.globals["lipsum"]  # random text: no chat template's business
    env.filters["tojson"] = _to_json
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = lambda form: (env.now or datetime.now()).strftime(form)
    return env


def render(request: dict) -> dict:
    """The reply to one request; what the template itself does wrong is a reply, too."""
    try:
        template = _compiled(request["source"])
        env = template.environment
        env.now = datetime.fromisoformat(request["now"]) if request["now"] else None
        env.marks = _marks() if request["marks"] else None
        text = _bounded(template.generate(request["variables"]), request["output_limit"])
        return _spans(text, env.marks) if env.marks else {"text": text, "spans": []}
    except MemoryError:
        return {"error": f"the template needs more than {MEMORY_LIMIT_BYTES >> 20} MiB of memory"}
    except REFUSALS as refusal:
        return {"error": f"{type(refusal).__name__}: {refusal}"}


@lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    return environment().from_string(source)


def _bounded(pieces: jinja2.environment.TemplateStream, limit: int) -> str:
    """The joined pieces, refused as soon as they are longer than `limit` characters."""
    kept, length = [], 0
    for piece in pieces:
        kept.append(piece)
        length += len(piece)
        if length > limit:
            raise ValueError(f"the template writes more than {limit:,} characters")
    return "".join(kept)


@lru_cache(maxsize=1)
def _marks() -> tuple[str, str]:
    """The marks before and after generated text: random, so that no conversation can hold them."""
    name = secrets.token_hex(16)
    return f"\ue000{name}\ue001", f"\ue002{name}\ue003"


def _spans(marked: str, marks: tuple[str, str]) -> dict:
    """The text without its marks, and where between two marks it stood."""
    before, after = marks
    text, spans = "", []
    outside, *rest = marked.split(before)
    text += outside
    for part in rest:
        inside, found, outside = part.partition(after)
        if not found or after in outside:
            raise ValueError("{% generation %} blocks must not lie inside each other, nor be cut by a filter")
        spans.append((len(text), len(text) + len(inside)))
        text += inside + outside
    if after in text or any(end > start for (_, end), (start, _) in pairwise(spans)):
        raise ValueError("{% generation %} blocks are out of order")
    return {"text": text, "spans": spans}


def _to_json(value: object, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """transformers' `tojson`: plain JSON, where jinja2's own would escape `<` for HTML and sort the keys."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _limit_memory() -> None:
    if sys.platform == "linux":  # elsewhere the kernel does not hold RLIMIT_AS, and the time limit stands alone
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))


def main() -> None:
    """Answer requests on stdin until it closes, which it does when the parent ends, however that happens."""
    _limit_memory()
    print(json.dumps({"ready": jinja2.__version__}), flush=True)
    for line in sys.stdin:
        print(json.dumps(render(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
