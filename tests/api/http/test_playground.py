"""The pages' files: public, never from elsewhere, never changed by a request, and strict about what they may do."""

import asyncio
import re
from importlib.resources import files
from pathlib import Path

import pytest

from servd.api.http.assets import asset_names
from servd.config import ServerConfig
from tests.api.http.serving import Reply, serve

PAGES = ["/", "/docs"]
FILES = [f"/web/{name}" for name in asset_names()]
TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}


def text_of(name: str) -> str:
    return files("servd.api.http.web").joinpath(name).read_text()


def test_pages_and_files_are_public_and_hold_their_types(tmp_path: Path) -> None:
    async def main() -> dict[str, Reply]:
        async with serve(tmp_path, server=ServerConfig(port=0, api_key="secret")) as served:
            return {path: await served.request("GET", path) for path in PAGES + FILES}

    for path, reply in asyncio.run(main()).items():
        assert reply.status == 200, path
        kind = TYPES["html" if path in PAGES else path.rpartition(".")[2]]
        assert reply.headers["Content-Type"].startswith(kind), path
        assert reply.headers["X-Content-Type-Options"] == "nosniff"
        assert b"secret" not in reply.body


def test_the_policy_allows_nothing_inline_and_nothing_from_elsewhere(tmp_path: Path) -> None:
    async def main() -> str:
        async with serve(tmp_path) as served:
            return (await served.request("GET", "/")).headers["Content-Security-Policy"]

    policy = dict(part.strip().split(" ", 1) for part in asyncio.run(main()).split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"


def test_who_has_a_file_is_told_so(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path) as served:
            first = await served.request("GET", "/web/app.js")
            for known, status in ((first.headers["ETag"], 304), ("*", 304), ('"other"', 200)):
                again = await served.request("GET", "/web/app.js", headers={"If-None-Match": known})
                assert (again.status, again.headers["ETag"]) == (status, first.headers["ETag"])
                assert again.body == (b"" if status == 304 else first.body)

    asyncio.run(main())


@pytest.mark.parametrize(
    "name", ["nope.js", "__init__.py", "..%2fapp.py", "%2e%2e%2fassets.py", ".", "%00", "app.js%00"]
)
def test_no_other_file_can_be_had(tmp_path: Path, name: str) -> None:
    async def main() -> Reply:
        async with serve(tmp_path) as served:
            return await served.request("GET", f"/web/{name}")

    assert asyncio.run(main()).status == 404


@pytest.mark.parametrize("name", asset_names())
def test_files_ask_for_nothing_from_elsewhere_and_parse_no_text_as_markup(name: str) -> None:
    text = text_of(name)
    addresses = set(re.findall(r"""["'(](?:https?:)?//[\w.]+""", text)) - {'"http://www.w3.org', "'http://www.w3.org"}
    assert addresses == set()
    for forbidden in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
        assert forbidden not in text, forbidden
    if name.endswith(".html"):
        assert not re.search(r"\son\w+=|\sstyle=|<style|<script(?![^>]*\ssrc=)", text)


@pytest.mark.parametrize("name", [name for name in asset_names() if name.endswith((".js", ".html"))])
def test_whatever_a_file_asks_for_is_there(name: str) -> None:
    wanted = set(re.findall(r"/web/([\w.]+)", text_of(name)))
    assert wanted <= set(asset_names())
