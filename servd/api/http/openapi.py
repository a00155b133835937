"""OpenAPI 3.1 from the endpoints themselves: what each takes, answers and refuses, said where it is registered.

Knows nothing of any one endpoint. Schemas come from the msgspec types that parse the bodies.
"""

from __future__ import annotations

import functools
import hashlib
import http
import inspect
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from servd import __version__
from servd.api.http.errors import ForbiddenError, UnsupportedEncodingError
from servd.api.http.field_ranges import FIELD_RANGES
from servd.api.http.query import check_known
from servd.errors import (
    AuthenticationError,
    DeadlineExceededError,
    EngineUnavailableError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    PayloadTooLargeError,
    RequestFailedError,
    ServdError,
)

JSON = "application/json"
EVENTS = "text/event-stream"
_REF = "#/components/schemas/{name}"

GENERATES: tuple[type[ServdError], ...] = (
    InvalidRequestError, NotFoundError, DeadlineExceededError, OverloadedError, RequestFailedError,
    EngineUnavailableError,
)  # fmt: skip
"""What an endpoint that runs the model may refuse or fail with."""

_WITH_BODY = (InvalidRequestError, DeadlineExceededError, PayloadTooLargeError, UnsupportedEncodingError)


class ErrorBody(msgspec.Struct):
    """What went wrong, in OpenAI's words: `param` names the field to blame, if one is."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(msgspec.Struct):
    """The body of every reply that is not a success."""

    error: ErrorBody


@dataclass(frozen=True, slots=True)
class Operation:
    """What one endpoint takes and gives, for people and for programs that read /openapi.json.

    body: the type that parses the request's JSON. reply: the type of a JSON success. events: the type of the `data` of
    one server-sent event, where the endpoint streams (always, if there is no `reply`). media_type: of a success that is
    neither; "" where it is empty. query: parameter → JSON schema; a GET below /v1 is refused with any other. errors:
    what it raises, beyond what every endpoint may. replies: types of other statuses, None where they are empty. ranges:
    as in `field_ranges`, for a body type of the route's own. error: the type of its failures. public: answers without a
    key.
    """

    summary: str
    body: Any = None
    reply: Any = None
    events: Any = None
    media_type: str = JSON
    query: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    errors: Sequence[type[ServdError]] = ()
    replies: Mapping[int, Any] = field(default_factory=dict)
    ranges: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    error: Any = ErrorReply
    public: bool = False
    hidden: bool = False  # a page or a file for people: not in the document

    def types(self) -> list[Any]:
        """All types whose schemas the document needs."""
        return [t for t in (self.body, self.reply, self.events, self.error, *self.replies.values()) if t is not None]


@dataclass(frozen=True, slots=True)
class Endpoint(web.AbstractRouteDef):
    """A route that says what it does; an entry of a route file's `ROUTES`. GET answers HEAD too."""

    method: str
    path: str  # aiohttp's form: /v1/models/{model:.+}
    handler: Handler
    operation: Operation

    def register(self, router: web.UrlDispatcher) -> list[web.AbstractRoute]:
        """Called by the router's `add_routes`."""
        if self.method == "GET":
            return [router.add_get(self.path, self._with_known_query() if self._checks_query() else self.handler)]
        return [router.add_route(self.method, self.path, self.handler)]

    def _checks_query(self) -> bool:
        """Probes and pages are asked with parameters of others' making; clients of the API must not be misled."""
        return self.path.startswith("/v1/")

    def _with_known_query(self) -> Handler:
        @functools.wraps(self.handler)
        async def checked(request: web.Request) -> web.StreamResponse:
            check_known(request.query, self.operation.query)
            return await self.handler(request)

        return checked


class ApiDocument:
    """The document of a set of endpoints, made once when somebody first asks."""

    def __init__(self, endpoints: Iterable[web.AbstractRouteDef]) -> None:
        self._endpoints = [e for e in endpoints if isinstance(e, Endpoint) and not e.operation.hidden]

    @cached_property
    def json(self) -> bytes:
        """The document as JSON."""
        return msgspec.json.encode(document(self._endpoints))

    @cached_property
    def etag(self) -> str:
        """Changes when the document does."""
        return hashlib.sha256(self.json).hexdigest()[:16]


API_DOCUMENT = web.AppKey("api_document", ApiDocument)


def document(endpoints: Sequence[Endpoint]) -> dict[str, Any]:
    """The OpenAPI document as plain data."""
    refs, components = _schemas([endpoint.operation for endpoint in endpoints])
    paths: dict[str, dict[str, Any]] = {}
    names: Counter[str] = Counter()
    for endpoint in endpoints:
        path = re.sub(r"\{(\w+):[^/]*\}", r"{\1}", endpoint.path)
        described = paths.setdefault(path, {})[endpoint.method.lower()] = _operation(endpoint, path, refs)
        names[described["operationId"]] += 1
        if (count := names[described["operationId"]]) > 1:  # the same handler under another path
            described["operationId"] += f"_{count}"
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "servd",
            "version": __version__,
            "description": "An LLM serving engine. Every field is honoured, or refused by name.",
        },
        "paths": dict(sorted(paths.items())),
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "where the server asks"}},
        },
        "security": [{"key": []}, {}],
    }


def _operation(endpoint: Endpoint, path: str, refs: Mapping[Any, dict[str, Any]]) -> dict[str, Any]:
    operation = endpoint.operation
    described: dict[str, Any] = {
        "operationId": getattr(endpoint.handler, "__name__", path),
        "summary": operation.summary,
        "description": inspect.getdoc(endpoint.handler) or "",
        "responses": _responses(operation, refs),
    }
    if operation.public:
        described["security"] = []
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in re.findall(r"\{(\w+)\}", path)
    ]
    parameters += [{"name": name, "in": "query", "schema": schema} for name, schema in operation.query.items()]
    if parameters:
        described["parameters"] = parameters
    if operation.body is not None:
        described["requestBody"] = {"required": True, "content": {JSON: {"schema": refs[operation.body]}}}
    return described


def _responses(operation: Operation, refs: Mapping[Any, dict[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    error = refs[operation.error]
    if operation.error is not ErrorReply:  # the layers around a handler do not always know its shape
        error = {"anyOf": [error, refs[ErrorReply]]}
    if operation.reply is not None:
        content[JSON] = {"schema": refs[operation.reply]}
    if operation.events is not None:
        content[EVENTS] = {"schema": _event({"anyOf": [refs[operation.events], error]})}
    if not content and operation.media_type:
        content[operation.media_type] = {"schema": {"type": "string"}}
    responses: dict[str, Any] = {"200": {"description": "as asked"} | ({"content": content} if content else {})}
    for status, text in sorted(_failures(operation).items()):
        responses[str(status)] = {"description": text, "content": {JSON: {"schema": error}}}
    for status, reply in operation.replies.items():
        described: dict[str, Any] = {"description": http.HTTPStatus(status).phrase}
        if reply is not None:
            described["content"] = {JSON: {"schema": refs[reply]}}
        responses[str(status)] = described
    return responses


def _event(data: dict[str, Any]) -> dict[str, Any]:
    """The schema of one server-sent event, whose data is the text of JSON."""
    return {
        "type": "object",
        "description": "One event of the stream. A stream of an answer ends with an event whose data is [DONE]; one "
        "that fails, with an event whose data is an ErrorReply.",
        "required": ["data"],
        "properties": {
            "id": {"type": "string"},
            "event": {"type": "string"},
            "data": {
                "anyOf": [
                    {"const": "[DONE]"},
                    {"type": "string", "contentMediaType": JSON, "contentSchema": data},
                ]
            },
        },
    }


def _failures(operation: Operation) -> dict[int, str]:
    """Status → what it means, of all that the endpoint and the layers around it may answer."""
    errors: list[type[ServdError]] = [ServdError, InvalidRequestError, ForbiddenError]
    if not operation.public:
        errors += [AuthenticationError, OverloadedError, EngineUnavailableError]
    if operation.body is not None:
        errors += _WITH_BODY
    texts: dict[int, list[str]] = {}
    for error in (*errors, *operation.errors):
        text = "The server failed." if error is ServdError else (inspect.getdoc(error) or "").partition("\n")[0]
        known = texts.setdefault(error.http_status, [])
        if text not in known:
            known.append(text)
    return {status: " ".join(lines) for status, lines in texts.items()}


def _schemas(operations: Sequence[Operation]) -> tuple[dict[Any, dict[str, Any]], dict[str, Any]]:
    """A reference for each type, and the components referred to, narrowed by what is checked after parsing."""
    unique = list(dict.fromkeys([ErrorReply, *(t for operation in operations for t in operation.types())]))
    schemas, components = msgspec.json.schema_components(unique, ref_template=_REF)
    refs = dict(zip(unique, schemas, strict=True))
    named = {schema["$ref"].rpartition("/")[2]: t for t, schema in refs.items() if "$ref" in schema}
    ranged = {t.__name__: t for t in FIELD_RANGES}
    own = {operation.body: operation.ranges for operation in operations if operation.ranges}
    for name, component in components.items():
        cls = named.get(name, ranged.get(name))
        tables = [FIELD_RANGES.get(base, {}) for base in reversed(getattr(cls, "__mro__", ()))]
        for field_name, ranges in (item for table in (*tables, own.get(cls, {})) for item in table.items()):
            _narrow(component["properties"][field_name], ranges)
        for field_name, neutral in getattr(cls, "NEUTRAL", {}).items():
            component["properties"][field_name]["enum"] = list(neutral)
    return refs, components


def _narrow(schema: dict[str, Any], ranges: Mapping[str, Any]) -> None:
    """Add each keyword to the alternative whose type it is about; an enum stands for all of them."""
    for keyword, value in ranges.items():
        if keyword == "enum":
            schema.pop("anyOf", None)
        kinds = _KEYWORD_TYPES.get(keyword, ())
        for alternative in schema.get("anyOf", [schema]):
            if not kinds or alternative.get("type") in kinds:
                alternative[keyword] = value


_KEYWORD_TYPES = {
    "minimum": ("integer", "number"),
    "maximum": ("integer", "number"),
    "exclusiveMinimum": ("integer", "number"),
    "minLength": ("string",),
    "maxLength": ("string",),
    "minItems": ("array",),
    "maxItems": ("array",),
    "items": ("array",),
    "pattern": ("string",),
    "maxProperties": ("object",),
    "properties": ("object",),
    "required": ("object",),
    "oneOf": ("object",),
    "propertyNames": ("object",),
    "additionalProperties": ("object",),
}
