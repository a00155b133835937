"""What HTTP and gRPC ask of a conversation alike: how long it may be, and whose turns it holds.

Knows nothing of JSON, protobuf or chat templates.
"""

from __future__ import annotations

from servd.errors import InvalidRequestError

MAX_MESSAGES = 4096
ROLES = ("system", "developer", "user", "assistant", "tool")


def check_num_messages(num_messages: int) -> None:
    """Raise InvalidRequestError for more than are looked at one by one."""
    if num_messages > MAX_MESSAGES:
        raise InvalidRequestError(f"messages has {num_messages} entries; allowed: {MAX_MESSAGES}", param="messages")


def template_role(role: str, where: str) -> str:
    """The role as chat templates know it. Raises InvalidRequestError naming `where`.role."""
    if role not in ROLES:
        raise InvalidRequestError(f"{where}.role is {role[:100]!r}; allowed: {', '.join(ROLES)}", param=f"{where}.role")
    return "system" if role == "developer" else role
