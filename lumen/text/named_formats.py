"""Chat formats by name, as `data.chat_format = "chatml"`, and how one is put on the tokenizer of a base model.

A format says which text ends a turn. What ends a generation is a token, and it must be the same one in lumen, in
config.json, generation_config.json and tokenizer_config.json, in the Modelfile and in the GGUF file, which can name one
EOS. So the end of a turn becomes the tokenizer's EOS:

    the text is one token of this vocabulary     that token is EOS from now on; the EOS before still ends a text, too
    the format itself ends turns with EOS        EOS, as it is
    neither, and the page allows it              EOS takes the text's place, in the turns of all roles
    neither, and the page does not allow it      refused: the token must be added to the vocabulary first

A tokenizer that begins texts with BOS gets a template that does so, whether the page's turns begin with it or not; one
without BOS gets none.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache

from lumen.errors import ConfigError, closest
from lumen.page import ChatPage, FormatPage, read_format_pages
from lumen.text.chat_format import write_jinja
from lumen.text.tokenizer import Tokenizer

BOS, EOS = "{bos}", "{eos}"


def format_names() -> dict[str, str]:
    """Every name and alias, and the name of the page that it means."""
    return {name: page.name for page in _pages().values() for name in (page.name, *page.aliases)}


def load_format(name: str) -> FormatPage:
    """The page of a format; ConfigError for a name that none bears."""
    names = format_names()
    if name not in names:
        raise ConfigError(
            f"data.chat_format: there is no format {name!r}.{closest(name, names)} Known: {', '.join(names)}."
        )
    return _pages()[names[name]]


@cache
def _pages() -> Mapping[str, FormatPage]:
    return {page.name: page for page in read_format_pages()}


def end_of_turn(chat: ChatPage) -> str:
    """The text whose token ends an answer: what closes the last one, without the blanks around it."""
    return (chat.assistant[1] if chat.last_after is None else chat.last_after).strip()


def adopt_format(tokenizer: Tokenizer, page: FormatPage) -> tuple[Tokenizer, str]:
    """`tokenizer` with the format's chat template and its end of turn as EOS; and a sentence that says which that is.

    ConfigError for a format whose end is no token of the vocabulary, and for a tokenizer without EOS where one is
    needed.
    """
    chat, end = page.chat, end_of_turn(page.chat)
    single = end != EOS and tokenizer.token_to_id(end) is not None and len(tokenizer.encode(end)) == 1
    if single:
        if tokenizer.token_to_id(end) != tokenizer.eos_id:
            tokenizer = tokenizer.with_roles(eos_token=end)
        note = f"{page.name}: {end!r} ends an answer, a token of the vocabulary; it is the EOS token."
    elif tokenizer.eos_id is None:
        raise ConfigError(f"{page.name} needs a token that ends an answer, and this tokenizer names no EOS token.")
    elif end == EOS:
        note = f"{page.name}: {_eos(tokenizer)!r}, the EOS token, ends an answer, as the format has it."
    elif page.eos_may_end_turns:
        chat = _substitute(chat, end, EOS)
        note = f"{page.name}: {_eos(tokenizer)!r}, the EOS token, stands in the place of {end!r}, no token here."
    else:
        takers = ", ".join(sorted(other.name for other in _pages().values() if other.eos_may_end_turns))
        raise ConfigError(
            f"data.chat_format: {page.name!r} ends a turn with {end!r}, which is no token of this tokenizer: "
            f"generation would not stop. Add the format's tokens to the vocabulary (tokens.add), or choose one that "
            f"can end turns with this model's EOS token: {takers}."
        )
    return with_turns(tokenizer, chat), note


def with_turns(tokenizer: Tokenizer, chat: ChatPage) -> Tokenizer:
    """`tokenizer` with the chat template of these turns, which begins with BOS where the tokenizer has it so."""
    bos = None if tokenizer.bos_id is None else tokenizer.id_to_token(tokenizer.bos_id)
    if bos is None:
        chat = _substitute(chat, BOS, "")
    elif tokenizer.add_bos and not (chat.begin + chat.user[0]).startswith((BOS, bos)):
        chat = replace(chat, begin=BOS + chat.begin)
    return tokenizer.with_chat_template(write_jinja(chat))


def stop_strings(page: FormatPage, tokenizer: Tokenizer) -> list[str]:
    """The texts at which a generation in this format stops, for `tokenizer` as `adopt_format` returned it."""
    end = end_of_turn(page.chat)
    own = [] if end == EOS or tokenizer.token_to_id(end) is None else [end]
    return list(dict.fromkeys([*own, *(tokenizer.id_to_token(id) for id in tokenizer.stop_ids)]))


def _eos(tokenizer: Tokenizer) -> str:
    return tokenizer.id_to_token(tokenizer.eos_id)


def _substitute(chat: ChatPage, text: str, other: str) -> ChatPage:
    """`chat` with `other` wherever its turns have `text`."""
    pairs = {
        key: [part.replace(text, other) for part in getattr(chat, key)]
        for key in ("system", "user", "assistant", "think")
    }
    texts = {
        key: None if (found := getattr(chat, key)) is None else found.replace(text, other)
        for key in ("begin", "prompt", "last_after")
    }
    return replace(chat, **pairs, **texts)
