"""The queries of the routes that read kept responses: where to go on, and which page of a list.

Knows nothing of responses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from multidict import MultiMapping

from servd.api.http.responses.schema import check_includes
from servd.errors import InvalidRequestError, UnsupportedError

MAX_PAGE = 100
_BOOLS = {"true": True, "false": False}


def stream_position(query: MultiMapping[str]) -> int | None:
    """The sequence number after which events are wanted (-1: all of them), or None: no events.

    Raises InvalidRequestError, UnsupportedError.
    """
    _check_known(query, ("stream", "starting_after", "include", "include[]", "include_obfuscation"))
    if _bool(query, "include_obfuscation"):
        raise UnsupportedError("include_obfuscation is true; allowed: false", param="include_obfuscation")
    if not _bool(query, "stream"):
        if "starting_after" in query:
            raise InvalidRequestError(
                "starting_after is set; allowed only with stream=true", param="starting_after"
            )
        return None
    return _int(query, "starting_after", -1, 0, 1 << 40)


def item_page(query: MultiMapping[str], items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A page of the list, the newest first unless told otherwise. Raises InvalidRequestError, UnsupportedError."""
    _check_known(query, ("limit", "order", "after", "include", "include[]"))
    limit = _int(query, "limit", 20, 1, MAX_PAGE)
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise InvalidRequestError(f"order is {order[:100]!r}; allowed: asc, desc", param="order")
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


def _check_known(query: MultiMapping[str], known: tuple[str, ...]) -> None:
    for name in query:
        if name not in known:
            raise InvalidRequestError(
                f"{name[:100]!r} is not known in the query; allowed: {', '.join(known)}", param=name[:100]
            )
    check_includes([*query.getall("include", []), *query.getall("include[]", [])])


def _bool(query: MultiMapping[str], name: str) -> bool:
    text = query.get(name, "false")
    if text not in _BOOLS:
        raise InvalidRequestError(f"{name} is {text[:100]!r}; allowed: true, false", param=name)
    return _BOOLS[text]


def _int(query: MultiMapping[str], name: str, default: int, low: int, high: int) -> int:
    text = query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 15 and low <= int(text) <= high):
        raise InvalidRequestError(f"{name} is {text[:100]!r}; allowed: {low} to {high}", param=name)
    return int(text)
