"""A Modelfile, by which Ollama runs an exported GGUF file with the chat format that was trained.

    FROM "./demo-q8_0.gguf"
    TEMPLATE \"\"\"…\"\"\"              Go's text/template; without one Ollama guesses, or sends the bare prompt
    PARAMETER stop "<|eot_id|>"  once for each token that ends an answer
    PARAMETER num_ctx 8192       Ollama's own default is 2048
    SYSTEM \"\"\"…\"\"\"               where the chat template has a system text of its own

The grammar has no escapes. A value in triple quotes is taken as it stands, but a line that ends in triple quotes closes
it, and characters that Go does not call printable are dropped, even there. What it cannot hold is refused.

Decision: the TEMPLATE is generated from the turns that were found in the Jinja template, never taken from a list ·
because of 97 published pairs of Jinja and Go templates only 21 wrote the same text on four conversations · revisit when
Ollama renders the GGUF's own Jinja template in all its versions.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from lumen.errors import DataError, ExportError
from lumen.formats.atomic import write_text
from lumen.spec import load_family
from lumen.text.chat_format import Turns, find_turns
from lumen.text.template import ChatTemplate
from lumen.text.tokenizer import load_tokenizer
from lumen.text.turns import chat_template

BARE_TEMPLATE = "{{ .Prompt }}"  # for a model without a chat format: it goes on from the text
MAX_NUM_CTX = 8192  # Ollama reserves the cache for all of it at once; 128k tokens would fill most GPUs


def write_modelfile(model_folder: Path | str, path: Path | str, gguf: str, *, num_ctx: int = 0) -> None:
    """Writes the Modelfile `path` for the model in `model_folder`, whose GGUF file `gguf` lies beside it.

    num_ctx  tokens of context that Ollama makes room for; 0 takes the model's own length, up to `MAX_NUM_CTX`

    ExportError where the chat template cannot be written as turns, or a text does not fit into the grammar.
    """
    folder = Path(model_folder)
    tokenizer = load_tokenizer(folder)
    template = chat_template(tokenizer)
    turns = None if template is None else _turns(template, folder)
    bos = tokenizer.id_to_token(tokenizer.bos_id) if tokenizer.add_bos else ""
    text = modelfile(
        gguf=gguf,
        template=BARE_TEMPLATE if turns is None else go_template(turns, bos),
        stops=[tokenizer.id_to_token(id) for id in tokenizer.stop_ids],
        num_ctx=num_ctx or min(load_family(folder).context_length, MAX_NUM_CTX),
        system=(turns.default_system if turns else None) or "",
    )
    write_text(path, text)


def _turns(template: ChatTemplate, folder: Path) -> Turns:
    try:
        return find_turns(template)
    except DataError as reason:
        raise ExportError(
            f"{folder}: no Ollama TEMPLATE can be made that writes what the chat template does. {reason} The GGUF file "
            f"alone holds the chat template, which llama.cpp's server renders."
        ) from None


def modelfile(*, gguf: str, template: str, stops: Sequence[str], num_ctx: int, system: str = "") -> str:
    """The text of a Modelfile. ExportError for what its grammar cannot hold; `gguf` is a file name, not a path."""
    if gguf != Path(gguf).name or not gguf.endswith(".gguf"):
        raise ExportError(f"FROM wants the name of a .gguf file beside the Modelfile, found {gguf!r}.")
    lines = [
        f"FROM {_quoted(f'./{gguf}', 'FROM')}",
        f"TEMPLATE {_quoted(template, 'TEMPLATE')}",
        *[f"PARAMETER stop {_quoted(stop, 'stop')}" for stop in stops],
        f"PARAMETER num_ctx {num_ctx}",
    ]
    if system:
        lines.append(f"SYSTEM {_quoted(system, 'SYSTEM')}")
    return "\n".join(lines) + "\n"


def _quoted(text: str, what: str) -> str:
    """`text` as a value of the grammar: in plain quotes where that is safe, else in triple quotes."""
    for character in text:
        if not character.isprintable() and character not in "\n\r\t":
            raise ExportError(
                f"{what}: Ollama drops U+{ord(character):04X} from a Modelfile; the text {text!r} holds one."
            )
    *lines, _ = re.split(r"[\r\n]", text)  # the end of the value is looked for at the end of every line but the last
    for line in lines:
        if line.rstrip().endswith('"""'):
            raise ExportError(f'{what}: the line {line!r} ends in """, which ends the value in a Modelfile. Change it.')
    if lines or '"' in text:
        return f'"""{text}"""'
    return f'"{text}"'


# --- the template ----------------------------------------------------------------------------------------------------


def go_template(turns: Turns, bos: str) -> str:
    """The prompt that `turns` write, as a Go template over Ollama's `.System` and `.Messages`.

    bos  the text of the BOS token where the runtime puts it before every prompt, which the template must then not do;
         else empty

    Ollama keeps system messages in `.Messages`, too: they are written from `.System` alone, which is all of them
    joined. A last message of the assistant is left open, to be continued. Where `turns` knows no system turn, `.System`
    is not written. Blanks around the words stay, also where the chat template strips them: Go's templates cannot.
    ExportError for a format that has something before BOS.
    """
    begin, user_before, assistant_after = turns.begin.removeprefix(bos), turns.user[0], turns.assistant[1]
    if bos and user_before.startswith(bos):  # Llama 2 begins every question with BOS; the first is the runtime's
        user_before = user_before.removeprefix(bos)
        assistant_after += bos
    if bos and bos in begin:
        raise ExportError(
            f"The chat template writes {turns.begin!r} first, with BOS in it, but runtimes put BOS before all else. "
            f"Change the template to begin with BOS."
        )
    system, first_system = "", ""
    if turns.system is not None:
        text = _text(turns.system[0]) + "{{ $.System }}" + _text(turns.system[1])
        if turns.system_in_user:
            first_system = "{{ if and $.System (eq $i 1) }}" + text + "{{ end }}"
        else:
            system = text if turns.default_system is not None else "{{ if .System }}" + text + "{{ end }}"
    return "".join(
        [
            _text(begin),
            system,
            "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}",
            '{{ if eq .Role "user" }}',
            _text(user_before) + first_system + "{{ .Content }}" + _text(turns.user[1]),
            "{{ if $last }}" + _text(turns.prompt) + "{{ end }}",
            '{{ else if eq .Role "assistant" }}',
            "{{ if $last }}" + _text(turns.prompt) + "{{ .Content }}",
            "{{ else }}" + _text(turns.assistant[0]) + "{{ .Content }}" + _text(assistant_after) + "{{ end }}",
            "{{ end }}{{ end }}",
        ]
    )


def _text(text: str) -> str:
    """`text` as it stands in a Go template; a brace that could begin an action is written by one."""
    return re.sub(r"\{(?=\{|\Z)", '{{ "{" }}', text)
