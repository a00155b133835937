"""Who may call, under which name, and what stands in the log: keys, browsers, request ids, paths and methods."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from aiohttp import web

from servd.api.http.app import create_app, discover_routes
from servd.api.service import InferenceService
from servd.config import ServerConfig
from servd.log import setup_logging
from tests.api.http.serving import CHAT, COMPLETIONS, serve

KEY = "sekret-key"
WRONG_KEYS = (None, "", "Bearer", "Bearer wrong", f"Basic {KEY}", KEY, "Bearer \u00ff\u00fe", f"Bearer {KEY}x")
PROBES = ("/health", "/livez", "/readyz", "/v2/health/live", "/v2/health/ready")
WITH_KEY = ServerConfig(port=0, api_key=KEY)


def all_routes() -> list[tuple[str, str]]:
    """All but Anthropic's, whose errors have a shape of their own: see test_messages."""
    routes = [route for route_file in discover_routes() for route in route_file if not route.operation.hidden]
    return [(route.method, route.path) for route in routes if not route.path.startswith("/v1/messages")]


def test_every_route_but_the_probes_wants_the_key(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path, server=WITH_KEY) as server:
            assert len(all_routes()) >= 9
            others = [("GET", "/nope"), ("POST", "/v1/models"), ("GET", "/v1/models/"), ("GET", "/health/"),
                      ("GET", "//health"), ("POST", "/v1/chat/completions/../../../health")]  # fmt: skip
            for method, path in all_routes() + others:
                path = path.replace("{model:.+}", "fake")
                for header in WRONG_KEYS:
                    headers = {} if header is None else {"Authorization": header}
                    reply = await server.request(method, path, headers=headers)
                    if path in PROBES and method == "GET":
                        assert reply.status == 200
                        continue
                    assert reply.status == 401, (method, path, header)
                    if path.startswith("/v2"):  # the Open Inference Protocol's shape
                        assert "no valid API key" in reply.json()["error"]
                    else:
                        assert reply.error()["code"] == "invalid_api_key", (method, path, header)
                    assert reply.headers["WWW-Authenticate"] == "Bearer"
                    assert KEY.encode() not in reply.body
            for header in (f"Bearer {KEY}", f"bearer  {KEY} "):
                reply = await server.request("GET", "/v1/models", headers={"Authorization": header})
                assert reply.status == 200

    asyncio.run(main())


def test_host_header_and_absolute_urls_do_not_open_the_door(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path, server=WITH_KEY) as server:
            for head in (
                b"GET /v1/models HTTP/1.1\r\nHost: x/health?",
                b"GET /v1/models HTTP/1.1\r\nHost: x/health#",
                b"GET http://x/v1/models?/health HTTP/1.1\r\nHost: x",
                b"GET /v1/models?x=/health HTTP/1.1\r\nHost: x",
                b"GET /health%2f..%2fv1/models HTTP/1.1\r\nHost: x",
                b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \xff\xfe",
            ):
                answer = await server.raw(head + b"\r\nConnection: close\r\n\r\n")
                assert answer.startswith((b"HTTP/1.1 401", b"HTTP/1.1 400")), (head, answer)

    asyncio.run(main())


def test_pages_of_other_sites_are_kept_out_of_a_local_server_without_key(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path) as server:
            body = {"prompt": "x", "max_tokens": 1}
            for headers, status in (
                ({}, 200),
                ({"Host": "localhost:8000"}, 200),
                ({"Host": "[::1]:8000"}, 200),
                ({"Host": "evil.example"}, 403),
                ({"Host": "localhost.evil.example:8000"}, 403),
                ({"Origin": "http://localhost:3000"}, 200),
                ({"Origin": "tauri://app"}, 200),
                ({"Origin": "https://evil.example"}, 403),
                ({"Origin": "null"}, 403),
            ):
                reply = await server.post(COMPLETIONS, body, headers=headers)
                assert reply.status == status, headers
                assert "Access-Control-Allow-Origin" not in reply.headers
            preflight = await server.request("OPTIONS", CHAT, headers={"Origin": "http://localhost:3000"})
            assert preflight.status == 405

    asyncio.run(main())


@pytest.mark.parametrize("server", [WITH_KEY, ServerConfig(port=0, host="0.0.0.0")])
def test_any_host_may_name_a_server_with_key_or_for_the_network(tmp_path: Path, server: ServerConfig) -> None:
    async def main() -> int:
        async with serve(tmp_path, server=server) as served:
            headers = {"Host": "models.example", "Authorization": f"Bearer {KEY}"}
            return (await served.request("GET", "/v1/models", headers=headers)).status

    assert asyncio.run(main()) == 200


def test_request_ids(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path) as server:
            for offered in ("abc-1.2_X", "x" * 128):
                for path, status in (("/health", 200), ("/nope", 404)):
                    reply = await server.request("GET", path, headers={"X-Request-Id": offered})
                    assert (reply.status, reply.headers["X-Request-Id"]) == (status, offered)
            fresh = set()
            for offered in ("", "x" * 129, "a b", "a;b", "\u00e9", "a\tb"):
                reply = await server.request("GET", "/health", headers={"X-Request-Id": offered})
                fresh.add(reply.headers["X-Request-Id"])
            assert len(fresh) == 6 and all(len(name) == 32 for name in fresh)
            stream = await server.post(COMPLETIONS, {"prompt": "x", "stream": True}, headers={"X-Request-Id": "s1"})
            assert stream.headers["X-Request-Id"] == "s1"

    asyncio.run(main())


def test_unknown_paths_and_methods(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path) as server:
            unknown = ("/web", "/web/x.js", "/v1", "/v1/speech", "/v1/models/", "/metrics/x", "/%00",
                       "/..%2f..%2fetc%2fpasswd", "/web/..%2f__init__.py")  # fmt: skip
            for path in unknown:
                reply = await server.request("GET", path)
                assert (reply.status, reply.error()["code"]) == (404, "unknown_path"), path
            for name in ("..%2f..%2fetc%2fpasswd", "a:b:c", "%00", "%ff", "\u2603", "x" * 4000):
                reply = await server.request("GET", f"/v1/models/{name}")
                assert (reply.status, reply.error()["param"]) == (404, "model"), name
            for method, path, allowed in (("GET", CHAT, "POST"), ("DELETE", "/v1/models", "GET,HEAD")):
                reply = await server.request(method, path)
                assert (reply.status, reply.headers["Allow"]) == (405, allowed)
                assert reply.error()["code"] == "method_not_allowed"

    asyncio.run(main())


def test_models_with_slashes_in_their_name_can_be_retrieved(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path) as server:
            app = create_app(InferenceService(server.engine, "org/model"), ServerConfig(port=0))
            runner = web.AppRunner(app)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            port = runner.addresses[0][1]
            for path in ("/v1/models/org/model", "/v1/models/org%2Fmodel"):
                async with server.session.get(f"http://127.0.0.1:{port}{path}") as reply:
                    assert (await reply.json())["id"] == "org/model"
            await runner.cleanup()

    asyncio.run(main())


def test_one_log_line_a_request_without_prompt_or_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def main() -> None:
        async with serve(tmp_path, server=WITH_KEY) as server:
            headers = {"Authorization": f"Bearer {KEY}", "X-Request-Id": "id-1"}
            await server.post(COMPLETIONS, {"prompt": "my diary", "max_tokens": 2}, headers=headers)
            await server.request("GET", "/x%0d%0aFORGED%1b[2J", headers=headers)
            await server.raw(b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")

    setup_logging("info")
    asyncio.run(main())
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3, lines
    assert "POST /v1/completions 200" in lines[0] and lines[0].endswith("127.0.0.1 api-key id-1")
    assert r"GET /x\r\nFORGED\x1b[2J 404" in lines[1]
    assert lines[2].endswith("bad HTTP 400 from 127.0.0.1")
    assert not any(secret in line for line in lines for secret in ("diary", KEY, "\x1b"))


def test_the_list_of_models_takes_what_other_dialects_send_along(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path) as server:
            reply = await server.request("GET", "/v1/models?limit=20&client_version=1.2.3")
            assert [model["id"] for model in reply.json()["data"]] == ["fake"]
            for limit in ("0", "1001", "x"):
                reply = await server.request("GET", f"/v1/models?limit={limit}")
                assert (reply.status, reply.error()["param"]) == (400, "limit")

    asyncio.run(main())
