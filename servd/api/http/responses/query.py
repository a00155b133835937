"""The queries of the routes that read kept responses: where to go on, and which page of a list.

Knows nothing of responses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from multidict import MultiMapping

from servd.api.http.query import choice, truth, whole_number
from servd.api.http.responses.schema import INCLUDES, check_includes
from servd.errors import InvalidRequestError, UnsupportedError

MAX_PAGE = 100
MAX_SEQUENCE_NUMBER = 1 << 40
ORDERS = ("desc", "asc")

_INCLUDE: dict[str, dict[str, Any]] = {
    name: {"type": "array", "items": {"enum": list(INCLUDES)}} for name in ("include", "include[]")
}
STREAM_QUERY: dict[str, dict[str, Any]] = _INCLUDE | {
    "stream": {"type": "boolean"},
    "starting_after": {"type": "integer", "minimum": 0, "maximum": MAX_SEQUENCE_NUMBER},
    "include_obfuscation": {"enum": [False]},
}
PAGE_QUERY: dict[str, dict[str, Any]] = _INCLUDE | {
    "limit": {"type": "integer", "minimum": 1, "maximum": MAX_PAGE},
    "order": {"enum": list(ORDERS)},
    "after": {"type": "string"},
}


def stream_position(query: MultiMapping[str]) -> int | None:
    """The sequence number after which events are wanted (-1: all of them), or None: no events.

    Raises InvalidRequestError, UnsupportedError.
    """
    _check_includes(query)
    if truth(query, "include_obfuscation"):
        raise UnsupportedError("include_obfuscation is true; allowed: false", param="include_obfuscation")
    if not truth(query, "stream"):
        if "starting_after" in query:
            raise InvalidRequestError(
                "starting_after is set; allowed only with stream=true", param="starting_after"
            )
        return None
    return whole_number(query, "starting_after", -1, 0, MAX_SEQUENCE_NUMBER)


def item_page(query: MultiMapping[str], items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A page of the list, the newest first unless told otherwise. Raises InvalidRequestError, UnsupportedError."""
    _check_includes(query)
    limit = whole_number(query, "limit", 20, 1, MAX_PAGE)
    order = choice(query, "order", "desc", ORDERS)
    ordered = list(items) if order == "asc" else list(reversed(items))
    after = query.get("after")
    if after is not None:
        places = [i for i, item in enumerate(ordered) if item["id"] == after]
        if not places:
            raise InvalidRequestError(f"after is {after[:100]!r}; allowed: the id of an item", param="after")
        ordered = ordered[places[0] + 1 :]
    page = ordered[:limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else "",
        "last_id": page[-1]["id"] if page else "",
        "has_more": len(ordered) > limit,
    }


def _check_includes(query: MultiMapping[str]) -> None:
    check_includes([*query.getall("include", []), *query.getall("include[]", [])])
