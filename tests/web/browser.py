"""A page of a served engine in headless Chromium, which any complaint of the browser fails."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from playwright.async_api import Page, async_playwright, expect

from tests.api.http.serving import Served

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or "chromium"
WAIT_MS = 15_000  # a bound on hangs
expect.set_options(timeout=WAIT_MS)


@asynccontextmanager
async def open_page(
    served: Served, path: str = "/", *, expects: tuple[str, ...] = (), **options: Any
) -> AsyncIterator[Page]:
    """A fresh browser profile at `path`; errors of scripts, and of the policy, may only be the `expects` ones."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            context = await browser.new_context(**({"viewport": {"width": 1440, "height": 900}} | options))
            page = await context.new_page()
            page.set_default_timeout(WAIT_MS)
            complaints: list[str] = []
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on("console", lambda line: complaints.append(line.text) if line.type == "error" else None)
            page.on("request", lambda request: _only_from(served, request.url, complaints))
            await page.goto(served.url + path)
            yield page
            assert [text for text in complaints if not any(known in text for known in expects)] == []
        finally:
            await browser.close()


def _only_from(served: Served, url: str, complaints: list[str]) -> None:
    if not url.startswith((served.url, "data:")):
        complaints.append(f"the page asked for {url}")


async def ask(page: Page, text: str) -> None:
    """Type a message and send it with Enter."""
    await page.fill("#input", text)
    await page.press("#input", "Enter")


async def answered(page: Page) -> None:
    """Wait until nothing is being streamed."""
    await expect(page.locator("[aria-busy=true]")).to_have_count(0)
