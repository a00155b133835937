"""What HTTP and gRPC ask of a conversation alike: how long it may be, and whose turns it holds.

Knows nothing of JSON, protobuf or chat templates.
"""

from __future__ import annotations

from collections.abc import Iterable

from servd.errors import InvalidRequestError

MAX_MESSAGES = 4096
MAX_TEMPLATE_VALUES = 10_000  # numbers, texts, lists and objects in chat_template_kwargs, and in documents
ROLES = ("system", "developer", "user", "assistant", "tool")


# What a template's caller may not override: the names that the renderer itself sets.
_RESERVED_TEMPLATE_NAMES = frozenset(
    ("messages", "tools", "documents", "tokenize", "chat_template", "add_generation_prompt", "continue_final_message",
     "bos_token", "eos_token", "raise_exception", "strftime_now", "conversation", "return_dict", "tokenizer")
)  # fmt: skip


def check_template_names(names: Iterable[str]) -> None:
    """Raise InvalidRequestError for a variable of the chat template that the server sets itself."""
    for name in names:
        if name in _RESERVED_TEMPLATE_NAMES:
            raise InvalidRequestError(
                f"chat_template_kwargs holds {name!r}, which the server sets itself", param="chat_template_kwargs"
            )


def check_num_messages(num_messages: int) -> None:
    """Raise InvalidRequestError for more than are looked at one by one."""
    if num_messages > MAX_MESSAGES:
        raise InvalidRequestError(f"messages has {num_messages} entries; allowed: {MAX_MESSAGES}", param="messages")


def template_role(role: str, where: str) -> str:
    """The role as chat templates know it. Raises InvalidRequestError naming `where`.role."""
    if role not in ROLES:
        raise InvalidRequestError(f"{where}.role is {role[:100]!r}; allowed: {', '.join(ROLES)}", param=f"{where}.role")
    return "system" if role == "developer" else role
