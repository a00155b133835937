"""/docs in a real browser: all operations, their schemas, and trying them."""

import asyncio
from pathlib import Path

from playwright.async_api import expect

from servd.config import ServerConfig
from tests.api.http.serving import serve
from tests.web.browser import open_page


def test_operations_are_listed_filtered_explained_and_tried(tmp_path: Path) -> None:
    async def main() -> None:
        fakes = {"replies": {"Hello": "fine"}}
        async with serve(tmp_path, **fakes) as served, open_page(served, "/docs", expects=("400",)) as page:
            paths = (await served.request("GET", "/openapi.json")).json()["paths"]
            await expect(page.locator(".operation")).to_have_count(sum(len(methods) for methods in paths.values()))
            await page.keyboard.press("/")
            await page.keyboard.type("chat comp")
            visible = page.locator(".operation:visible")
            await expect(visible).to_have_count(1)
            await visible.locator("summary").first.click()
            await expect(visible).to_contain_text("number from 0 to 100")
            await visible.get_by_role("button", name="Send").click()
            await expect(visible.locator(".result")).to_contain_text('"content": "fine"')
            await visible.locator("textarea").fill('{"messages": 1}')
            await visible.get_by_role("button", name="Send").click()
            await expect(visible.locator(".result")).to_contain_text("messages is an integer; allowed: an array")
            await page.set_viewport_size({"width": 360, "height": 740})
            assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")

    asyncio.run(main())


def test_the_document_wants_the_key_and_the_page_asks_for_it(tmp_path: Path) -> None:
    async def main() -> None:
        server = ServerConfig(port=0, api_key="s3cret")
        async with serve(tmp_path, server=server) as served, open_page(served, "/docs", expects=("401",)) as page:
            await page.fill("#key-input", "s3cret")
            await page.keyboard.press("Enter")
            await expect(page.locator(".operation").first).to_be_visible()

    asyncio.run(main())
