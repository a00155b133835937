"""Browsers: which pages may call, what a preflight is told, and that nothing is ever allowed with credentials.

Fault 46: reflected origins, CSRF, names rebound to 127.0.0.1.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from servd.api.http.cors import parse_origins
from servd.cli import main as servd_main
from servd.config import ServerConfig
from servd.errors import ConfigError
from tests.api.http.serving import CHAT, COMPLETIONS, Reply, serve

NAMED = "https://app.example"
OTHER = "https://evil.example"
ASKS = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,x-stainless-os"}


def allowed_origin(reply: Reply) -> str | None:
    assert "Access-Control-Allow-Credentials" not in reply.headers
    found: str | None = reply.headers.get("Access-Control-Allow-Origin")
    return found


@pytest.mark.parametrize("key", [None, "the-key"])
def test_only_named_pages_are_let_in(tmp_path: Path, key: str | None) -> None:
    config = ServerConfig(port=0, api_key=key, cors_origin=f"{NAMED}, http://localhost:3000")
    auth = {} if key is None else {"Authorization": f"Bearer {key}"}

    async def main() -> None:
        async with serve(tmp_path, server=config) as server:
            for path in (CHAT, "/v1/models", "/nowhere"):
                preflight = await server.request("OPTIONS", path, headers={"Origin": NAMED, **ASKS})
                assert (preflight.status, allowed_origin(preflight), preflight.body) == (204, NAMED, b"")
                assert preflight.headers["Access-Control-Allow-Headers"] == "authorization,x-stainless-os"
                assert "POST" in preflight.headers["Access-Control-Allow-Methods"]
                refused = await server.request("OPTIONS", path, headers={"Origin": OTHER, **ASKS})
                assert (refused.status >= 400, allowed_origin(refused)) == (True, None)
            body: dict[str, Any] = {"prompt": "x", "max_tokens": 2}
            for fields in ({}, {"stream": True}, {"top_p": 7}):
                reply = await server.post(COMPLETIONS, body | fields, headers={"Origin": NAMED} | auth)
                assert (reply.status == 400, allowed_origin(reply)) == ("top_p" in fields, NAMED)
                assert reply.headers["Vary"] == "Origin"
            foreign = await server.post(COMPLETIONS, body, headers={"Origin": OTHER} | auth)
            assert (foreign.status, allowed_origin(foreign)) == (403 if key is None else 200, None)
            without_key = await server.post(COMPLETIONS, body, headers={"Origin": NAMED})
            assert (without_key.status, allowed_origin(without_key)) == (200 if key is None else 401, NAMED)

    asyncio.run(main())


def test_a_preflight_repeats_no_header_that_is_none(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path, server=ServerConfig(port=0, cors_origin=NAMED)) as server:
            odd = {"Access-Control-Request-Headers": "x;<script>", "Access-Control-Request-Method": "POST"}
            reply = await server.request("OPTIONS", CHAT, headers={"Origin": NAMED, **odd})
            assert reply.status == 204 and "Access-Control-Allow-Headers" not in reply.headers

    asyncio.run(main())


def test_off_unless_asked_for(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path, server=ServerConfig(port=0, api_key="k")) as server:
            for origin in (NAMED, "null", "http://localhost:3000"):
                reply = await server.request("OPTIONS", CHAT, headers={"Origin": origin, **ASKS})
                assert (reply.status, allowed_origin(reply)) == (401, None)
                reply = await server.request("GET", "/health", headers={"Origin": origin})
                assert (reply.status, allowed_origin(reply)) == (200, None)

    asyncio.run(main())


def test_a_server_open_to_the_network_is_closed_to_pages_of_other_sites(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path, server=ServerConfig(port=0, host="0.0.0.0")) as server:
            for headers, status in (
                ({"Origin": OTHER}, 403),
                ({"Origin": "null"}, 403),
                ({"Origin": "http://box.lan:8000", "Host": "box.lan:8000"}, 200),
                ({"Origin": "http://box.lan:8001", "Host": "box.lan:8000"}, 403),
                ({"Host": "box.lan:8000"}, 200),
            ):
                reply = await server.post(COMPLETIONS, {"prompt": "x"}, headers=headers)
                assert reply.status == status, headers

    asyncio.run(main())


def test_origins_of_the_flag() -> None:
    assert parse_origins(" https://A.example/ ,http://[::1]:8000") == {"https://a.example", "http://[::1]:8000"}
    for wrong in ("app.example", "https://a.example/path", "null", "file://x", "https://*.example", "https://"):
        with pytest.raises(ConfigError, match="--cors-origin"):
            parse_origins(wrong)


def test_all_pages_only_with_a_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert servd_main(["serve", "none", "--port", "0", "--grpc-port", "-1", "--cors-origin", "*"]) == 2
    assert "allowed only where a key is needed" in capsys.readouterr().err
