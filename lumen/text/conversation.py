"""What is said, before and after it becomes tokens: turns of a conversation, and ids with what is learned of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Turn:
    """One message of a conversation.

    content  the text, or a list of parts as `{"type": "text", "text": …}`; None beside tool calls alone
    weight   0 keeps an assistant's turn from being learned; it is read as context all the same
    more     what else the template may read: `tool_calls`, `tool_call_id`, `name`, `reasoning_content`
    """

    role: str
    content: str | list[dict] | None
    weight: int = 1
    more: Mapping[str, object] = field(default_factory=dict)

    @property
    def message(self) -> dict:
        """The turn as chat templates expect it."""
        return {"role": self.role, "content": self.content, **self.more}


@dataclass(frozen=True)
class Conversation:
    """Turns in order, the tools that were on offer, and where the conversation was read."""

    turns: tuple[Turn, ...]
    tools: tuple[dict, ...] = ()
    source: str = ""

    @property
    def messages(self) -> list[dict]:
        return [turn.message for turn in self.turns]


@dataclass(frozen=True)
class PromptCompletion:
    """Text to go on from, and how it goes on; no roles and no chat template."""

    prompt: str
    completion: str
    source: str = ""


@dataclass(frozen=True)
class Text:
    """A document, learned from its first word to its last."""

    text: str
    source: str = ""


Record = Conversation | PromptCompletion | Text


@dataclass(frozen=True)
class Encoded:
    """One record as the model sees it: `learn[t]` says whether `ids[t]` is to be predicted from the ids before it."""

    ids: list[int]
    learn: list[bool]
    source: str = ""
