"""Who calls, and what that entitles to.

Knows nothing of headers and metadata: transports find the key, this tells whose it is.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Caller:
    """The holder of an API key, or everybody where none is asked for."""

    name: str = "anonymous"
    tenant: str = ""  # callers of one tenant share cached prefixes, pins and stored answers; others never see them


ANONYMOUS = Caller()
