"""/openapi.json says what every endpoint takes and answers, and says it truly."""

import asyncio
import json
import re

import jsonschema
import msgspec
import pytest

from servd.api.http import dialect_reply_types, reply_types
from servd.api.http.app import discover_routes
from servd.api.http.openapi import Endpoint, document
from servd.api.http.schema import ChatCompletionRequest
from tests.api.http.serving import serve

ENDPOINTS = [endpoint for route_file in discover_routes() for endpoint in route_file]


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda e: f"{e.method} {e.path}")
def test_every_route_says_what_it_does(endpoint):
    assert isinstance(endpoint, Endpoint), f"{endpoint} is no Endpoint: wrap it, with an Operation"
    operation = endpoint.operation
    assert operation.summary
    assert operation.hidden or endpoint.method == "GET" or operation.body is not None or operation.reply is not None


def test_operation_ids_are_unique():
    paths = document([e for e in ENDPOINTS if not e.operation.hidden])["paths"]
    ids = [operation["operationId"] for methods in paths.values() for operation in methods.values()]
    assert len(ids) == len(set(ids)), sorted(ids)


def test_the_document_lists_every_api_route_that_the_server_has(tmp_path):
    async def main():
        async with serve(tmp_path) as served:
            listed = (await served.request("GET", "/openapi.json")).json()["paths"]
            resources = [r.canonical for r in served.runner.app.router.resources()]
            hidden = {e.path for e in ENDPOINTS if e.operation.hidden}
            return set(listed), set(resources) - hidden

    listed, served_paths = asyncio.run(main())
    assert listed == served_paths


def test_references_lead_somewhere_and_fields_are_the_parsers(tmp_path):
    async def main():
        async with serve(tmp_path) as served:
            reply = await served.request("GET", "/openapi.json")
            again = await served.request("GET", "/openapi.json", headers={"If-None-Match": reply.headers["ETag"]})
            return reply, again

    reply, again = asyncio.run(main())
    spec = reply.json()
    schemas = spec["components"]["schemas"]
    for name in reply.body.decode().split("#/components/schemas/")[1:]:
        assert name.partition('"')[0] in schemas
    chat = schemas["ChatCompletionRequest"]
    assert set(chat["properties"]) == set(ChatCompletionRequest.__struct_fields__)
    assert chat["additionalProperties"] is False
    assert {"type": "number", "minimum": 0, "maximum": 100} in chat["properties"]["temperature"]["anyOf"]
    assert chat["properties"]["service_tier"]["enum"] == [None, "auto", "default"]
    assert again.status == 304 and again.body == b""


def test_errors_and_keys_are_described(tmp_path):
    async def main():
        async with serve(tmp_path) as served:
            return (await served.request("GET", "/openapi.json")).json()["paths"]

    paths = asyncio.run(main())
    chat = paths["/v1/chat/completions"]["post"]
    assert set(chat["responses"]) >= {"200", "400", "401", "403", "404", "408", "413", "415", "429", "500", "503"}
    assert set(chat["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    event = chat["responses"]["200"]["content"]["text/event-stream"]["schema"]["properties"]["data"]
    assert event["anyOf"][1]["contentSchema"]["anyOf"][0]["$ref"].endswith("/ChatCompletionChunk")
    assert chat["responses"]["429"]["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorReply")
    assert paths["/health"]["get"]["security"] == []
    assert "security" not in chat  # the document's own: with a key, where the server asks for one
    assert paths["/v1/models/{model}"]["get"]["parameters"][0]["name"] == "model"


MESSAGE = {"role": "user", "content": "hi"}
CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
CACHED = {"cache_control": {"type": "ephemeral", "ttl": None}}
RESULT = {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "x"}]}
BODIES = [
    ("/v1/responses", {"input": [MESSAGE, CALL, {"type": "function_call_output", "call_id": "c", "output": "1"}]}, 200),
    ("/v1/responses", {"input": [{"type": "reasoning", "summary": []}, MESSAGE | {"type": "message"}]}, 200),
    ("/v1/responses", {"input": "x", "tool_choice": "none", "include": ["message.output_text.logprobs"]}, 200),
    ("/v1/responses", {"input": [MESSAGE | {"role": "tool"}]}, 400),
    ("/v1/responses", {"input": [{"type": "function_call", "call_id": "c"}]}, 400),
    ("/v1/responses", {"input": "x", "tool_choice": "any"}, 400),
    ("/v1/responses", {"input": "x", "temperature": 101}, 400),
    ("/v1/responses", {"input": "x", "text": {"format": {"type": "xml"}}}, 400),
    ("/v1/messages", {"messages": [MESSAGE, MESSAGE | {"content": [RESULT]}], "max_tokens": 4}, 200),
    ("/v1/messages", {"messages": [MESSAGE], "max_tokens": 4} | CACHED, 200),
    ("/v1/messages", {"messages": [MESSAGE], "cache_control": {"type": "other"}, "max_tokens": 4}, 400),
    ("/v1/messages", {"messages": [{"role": "assistant", "content": [RESULT]}], "max_tokens": 4}, 400),
    ("/v1/messages", {"messages": [MESSAGE], "max_tokens": 0}, 400),
    ("/v1/messages", {"messages": [], "max_tokens": 4}, 400),
    ("/v1/messages", {"messages": [MESSAGE], "tools": [{"name": "f"}], "max_tokens": 4}, 400),
    ("/v1/responses", {"input": "x", "cache_salt": ""}, 400),
    ("/v1/responses", {"input": "x", "deadline_ms": 86400001}, 400),
    ("/v1/messages", {"messages": [MESSAGE], "max_tokens": 4, "cache_salt": ""}, 400),
    ("/v1/messages", {"messages": [MESSAGE], "max_tokens": 4, "deadline_ms": 86400001}, 400),
    ("/v1/embeddings", {"input": [[1, 2]], "pooling": "mean", "dimensions": 1}, 200),
    ("/v1/embeddings", {"input": "x", "pooling": "max"}, 400),
    ("/v1/prefixes", {"text": "x" * 40, "ttl_seconds": 1}, 200),
    ("/v1/prefixes", {"text": "x" * 40, "ttl_seconds": 0.5}, 400),
]


def test_a_body_is_taken_just_where_the_document_says_so(tmp_path):
    async def main():
        async with serve(tmp_path) as served:
            spec = (await served.request("GET", "/openapi.json")).json()
            return spec, [await served.post(path, {"model": "fake"} | body) for path, body, _ in BODIES]

    spec, replies = asyncio.run(main())
    for (path, body, status), reply in zip(BODIES, replies, strict=True):
        schema = spec["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        validator = jsonschema.Draft202012Validator({"components": spec["components"]} | schema)
        problems = [error.message for error in validator.iter_errors({"model": "fake"} | body)]
        assert (reply.status, not problems) == (status, status == 200), (path, body, reply.body, problems)


def test_what_is_told_of_a_request_a_message_and_a_deleted_response_is_as_documented(tmp_path):
    async def main():
        async with serve(tmp_path) as served:
            message = await served.post("/v1/messages", {"model": "fake", "messages": [MESSAGE], "max_tokens": 4})
            response = await served.post("/v1/responses", {"input": "x", "max_output_tokens": 4})
            counted = await served.post("/v1/responses/input_tokens", {"input": "x"})
            name = message.json()["id"]
            deleted = await served.request("DELETE", f"/v1/responses/{response.json()['id']}")
            return [
                (message, dialect_reply_types.AnthropicMessage),
                (counted, dialect_reply_types.ResponseInputTokens),
                (deleted, dialect_reply_types.DeletedResponse),
                (await served.request("GET", f"/v1/requests/{name}"), reply_types.RequestDescription),
                (await served.request("GET", "/v1/requests"), reply_types.RequestList),
            ]

    for reply, expected in asyncio.run(main()):
        assert reply.status == 200, reply.body
        parsed = msgspec.json.decode(reply.body, type=expected)
        assert msgspec.to_builtins(parsed) == reply.json()  # no field is missing, none is untold


def test_a_get_is_refused_with_a_parameter_that_the_document_does_not_name(tmp_path):
    paths = [re.sub(r"\{[^}]*\}", "x", e.path) for e in ENDPOINTS if e.method == "GET" and e.path.startswith("/v1/")]

    async def main():
        async with serve(tmp_path) as served:
            replies = [await served.request("GET", f"{path}?unheard=1") for path in paths]
            return [(reply.status, reply.error()["param"]) for reply in replies]

    assert {"/v1/models", "/v1/prefixes", "/v1/streams/x", "/v1/responses/x"} <= set(paths)
    assert asyncio.run(main()) == [(400, "unheard")] * len(paths)


def test_as_many_tools_are_taken_as_the_document_says(tmp_path):
    asked = {"model": "fake", "max_tokens": 1, "messages": [{"role": "user", "content": "x"}]}
    calls = {
        "/v1/chat/completions": asked | {"tools": [{"type": "function", "function": {"name": "f"}}]},
        "/v1/responses": {"input": "x", "tools": [{"type": "function", "name": "f"}]},
        "/v1/messages": asked | {"tools": [{"name": "f", "input_schema": {"type": "object"}}]},
    }

    async def main():
        async with serve(tmp_path) as served:
            too_many = [(path, body | {"tools": body["tools"] * 257}) for path, body in calls.items()]
            return [(await served.post(path, body)).json() for path, body in too_many]

    for reply in asyncio.run(main()):
        assert reply["error"]["message"] == "tools has 257 entries; allowed: at most 256"
    schemas = document(ENDPOINTS)["components"]["schemas"]
    for name in ("ChatCompletionRequest", "ResponseRequest", "MessagesRequest"):
        assert 'maxItems": 256' in json.dumps(schemas[name]["properties"]["tools"])
