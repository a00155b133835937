"""The playground, driven as a person would: by keyboard and pointer, in a real browser, over the engine with fakes."""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Page, expect

from servd.api.http.context import ENGINE_FEED
from servd.config import ServerConfig
from tests.api.http.serving import Served, serve
from tests.fakes import TEMPLATE_ERROR
from tests.web.browser import answered, ask, open_page

SHOWN = "Some **bold** and `code`.\n\n- one\n- two\n\n```python\nprint(1 < 2)\n```\n| a | b |\n|---|---|\n| 1 | 2 |\n"
HOSTILE = "<img src=x onerror=alert(1)> <script>alert(2)</script> [x](javascript:alert(3)) [ok](https://example.org/a)"


def drive(
    folder: Path, act: Callable[[Page, Served], Awaitable[None]], *, page_options: Any = None, **options: Any
) -> None:
    """Run `act` on a page of a fresh server."""

    async def main() -> None:
        async with serve(folder, **options) as served, open_page(served, **(page_options or {})) as page:
            await act(page, served)

    asyncio.run(main())


def test_an_answer_streams_in_and_is_shown_as_markdown_with_its_speed(tmp_path: Path) -> None:
    async def act(page: Page, _: Served) -> None:
        await ask(page, "show it")
        await expect(page.locator(".assistant .body")).to_have_text(re.compile("^Some"))
        assert await page.text_content("#send") == "Stop"
        await answered(page)
        answer = page.locator(".message.assistant")
        await expect(answer.locator("strong")).to_have_text("bold")
        await expect(answer.locator("li")).to_have_text(["one", "two"])
        await expect(answer.locator("pre")).to_have_text("print(1 < 2)")
        await expect(answer.locator("td")).to_have_text(["1", "2"])
        stats = await answer.locator(".stats").text_content()
        assert stats and "tokens/s" in stats and "first after" in stats and f"→ {len(SHOWN) + 1} tokens" in stats
        assert await page.text_content("#send") == "Send"

    drive(tmp_path, act, replies={"show it": SHOWN}, step_delay=0.01)


def test_what_a_model_writes_is_never_markup(tmp_path: Path) -> None:
    async def act(page: Page, _: Served) -> None:
        page.on("dialog", lambda dialog: pytest.fail(dialog.message))
        await ask(page, "attack")
        await answered(page)
        body = page.locator(".assistant .body")
        assert await body.locator("img, script").count() == 0
        assert "<img src=x onerror=alert(1)>" in (await body.text_content() or "")
        links = body.locator("a")
        assert [await link.get_attribute("href") for link in await links.all()] == ["https://example.org/a"]
        assert await links.first.get_attribute("rel") == "noopener noreferrer nofollow"

    drive(tmp_path, act, replies={"attack": HOSTILE})


def test_escape_stops_and_the_engine_is_free_at_once(tmp_path: Path) -> None:
    async def act(page: Page, served: Served) -> None:
        await ask(page, "go on for ever")
        await expect(page.locator(".assistant .body")).to_have_text(re.compile(r"\w{20}"))
        await page.keyboard.press("Escape")
        await answered(page)
        await served.fake.wait_idle()
        assert "stopped" in (await page.text_content(".assistant .stats") or "")
        await ask(page, "again")
        await page.wait_for_selector("[aria-busy=true]")
        await page.click("#send")  # it says Stop now
        await answered(page)
        await served.fake.wait_idle()

    drive(tmp_path, act, step_delay=0.01, max_position_embeddings=100_000, num_blocks=9000)


def test_a_refusal_is_shown_with_its_reason_and_can_be_mended(tmp_path: Path) -> None:
    async def act(page: Page, _: Served) -> None:
        await ask(page, f"hello {TEMPLATE_ERROR}")
        alert = page.get_by_role("alert").filter(has_text="refused by the chat template")
        await expect(alert).to_contain_text("The server refused this request: messages")
        await page.click("#clear")
        await page.fill("#set-temperature", "500")
        await ask(page, "hello")
        await expect(page.get_by_role("alert").first).to_contain_text("temperature is 500")
        await page.fill("#set-temperature", "0.5")
        await page.get_by_role("button", name="Try again").click()
        await answered(page)
        assert "fine" in (await page.text_content(".assistant .body") or "")
        await page.fill("#set-schema", "{not json")
        await ask(page, "hello")
        await expect(page.get_by_role("alert").first).to_contain_text("is not valid JSON")

    drive(tmp_path, act, replies={"hello": "fine"}, page_options={"expects": ("400",)})


def test_a_failure_in_mid_stream_is_shown_beside_what_came(tmp_path: Path) -> None:
    async def act(page: Page, served: Served) -> None:
        await ask(page, "talk")
        await expect(page.locator(".assistant .body")).to_have_text(re.compile(r"\w{10}"))
        [request_id] = served.engine._families
        served.engine.abort(request_id)
        await expect(page.get_by_role("alert").first).to_contain_text("aborted")
        assert len(await page.text_content(".assistant .body") or "") > 10

    drive(tmp_path, act, step_delay=0.01)


def test_history_and_settings_outlive_a_reload_and_clear_ends_them(tmp_path: Path) -> None:
    async def act(page: Page, _: Served) -> None:
        await page.fill("#set-system", "Be brief.")
        await ask(page, "first")
        await answered(page)
        await page.reload()
        await expect(page.locator(".message .body")).to_have_text(["first", "reply"])
        await expect(page.locator("#set-system")).to_have_value("Be brief.")
        await page.click("#clear")
        await page.reload()
        await expect(page.locator(".message")).to_have_count(0)
        await expect(page.locator("h1")).to_have_text("Ask the model something")

    drive(tmp_path, act, replies={"Be brief.": "reply"})


def test_editing_and_making_again_replace_what_follows(tmp_path: Path) -> None:
    async def act(page: Page, served: Served) -> None:
        for text in ("one", "two"):
            await ask(page, text)
            await answered(page)
        await page.get_by_role("button", name="Regenerate").first.click()
        await answered(page)
        await expect(page.locator(".user .body")).to_have_text(["one"])
        await page.get_by_role("button", name="Edit").click()
        await expect(page.locator("#input")).to_have_value("one")
        await page.keyboard.press("Escape")
        await expect(page.locator("#input")).to_have_value("")
        await page.get_by_role("button", name="Edit").click()
        await ask(page, "three")
        await answered(page)
        await expect(page.locator(".user .body")).to_have_text(["three"])
        assert len(served.executor.plans) > 3

    drive(tmp_path, act, replies={"user": "yes"})


def test_the_key_is_asked_for_kept_in_the_tab_and_sent(tmp_path: Path) -> None:
    async def act(page: Page, _: Served) -> None:
        dialog = page.locator("#key-dialog")
        await expect(dialog).to_be_visible()
        await page.fill("#key-input", "wrong")
        await page.keyboard.press("Enter")
        await expect(page.locator("#key-problem")).to_be_visible()
        await page.fill("#key-input", "s3cret")
        await page.keyboard.press("Enter")
        await expect(page.locator("#state-text")).to_have_text("fake")
        await ask(page, "hello")
        await answered(page)
        await expect(page.locator(".assistant .body")).to_have_text("fine")
        await page.click("#tab-code")
        code = await page.text_content("#view-code") or ""
        assert "$SERVD_API_KEY" in code and "s3cret" not in code
        assert "s3cret" not in json.dumps(await page.evaluate("({...localStorage})"))
        await page.click("#tab-engine")
        await expect(page.locator(".facts")).to_contain_text("0 / 64")
        await page.reload()
        await expect(page.locator("#state-text")).to_have_text("fake")
        await expect(dialog).to_be_hidden()

    server = ServerConfig(port=0, api_key="s3cret")
    drive(tmp_path, act, server=server, replies={"hello": "fine"}, page_options={"expects": ("401",)})


def test_the_engine_view_follows_the_engine_and_only_while_it_is_seen(tmp_path: Path) -> None:
    async def act(page: Page, served: Served) -> None:
        feed = served.runner.app[ENGINE_FEED]
        assert feed.num_listeners == 0
        await ask(page, "go")
        await page.click("#tab-engine")
        row = page.locator(".requests tbody tr")
        await expect(row).to_have_count(1)
        await expect(row).to_contain_text("decode")
        await expect(page.locator("#view-engine")).to_contain_text("% used")
        await expect(page.locator(".card .figures").first).to_have_text(re.compile("^[1-9].* out"))
        assert await page.evaluate(INKED, ".map") and await page.evaluate(INKED, ".bars")
        box = await page.locator("canvas.bars").bounding_box()
        assert box is not None
        await page.mouse.move(box["x"] + box["width"] - 8, box["y"] + 60)
        await expect(page.locator("#tip")).to_contain_text("step ")
        await page.keyboard.press("Escape")
        await expect(page.locator("#view-engine")).to_contain_text("None now.")
        await page.click("#tab-settings")
        await served.fake.wait_until(lambda: feed.num_listeners == 0)

    drive(tmp_path, act, step_delay=0.02)


INKED = """selector => {
  const canvas = document.querySelector(selector);
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  return new Set(new Uint32Array(data.buffer)).size > 2;
}"""


def test_tokens_show_what_else_was_likely(tmp_path: Path) -> None:
    async def act(page: Page, _: Served) -> None:
        await page.check("#set-tokens")
        await ask(page, "hello")
        await answered(page)
        tokens = page.locator(".token")
        await expect(tokens).to_have_text(["a", "b", "c", "<eos>"])
        await tokens.nth(1).hover()
        await expect(page.locator("#tip .chosen")).to_contain_text("b")
        await expect(page.locator("#tip .alternatives > div")).to_have_count(5)
        await page.focus(".tokens")
        await page.keyboard.press("ArrowLeft")
        await expect(page.locator("#tip .chosen")).to_contain_text("a")
        await page.get_by_role("button", name="Text", exact=True).click()
        await expect(page.locator(".assistant .body")).to_have_text("abc")

    drive(tmp_path, act, replies={"hello": "abc"})


def test_the_keyboard_is_enough(tmp_path: Path) -> None:
    async def act(page: Page, _: Served) -> None:
        await page.focus("#tab-settings")
        await page.keyboard.press("ArrowRight")
        await expect(page.locator("#tab-engine")).to_be_focused()
        await expect(page.locator("#view-engine")).to_be_visible()
        await page.keyboard.press("/")
        await expect(page.locator("#input")).to_be_focused()
        await page.keyboard.type("a/b")
        await page.keyboard.press("Shift+Enter")
        await page.keyboard.type("c")
        await expect(page.locator("#input")).to_have_value("a/b\nc")
        await page.keyboard.press("Enter")
        await answered(page)
        await expect(page.locator(".user .body")).to_have_text("a/b\nc")
        names = await page.evaluate(
            """[...document.querySelectorAll("button, input, textarea, a")].filter(e => e.offsetParent)
               .filter(e => !(e.textContent.trim() || e.getAttribute("aria-label") || e.labels?.length))
               .map(e => e.outerHTML)"""
        )
        assert names == []  # everything that can be focused has a name

    drive(tmp_path, act, replies={"a/b": "x"})


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1440])
def test_every_view_fits_its_screen_in_both_themes(tmp_path: Path, scheme: str, width: int) -> None:
    async def act(page: Page, _: Served) -> None:
        await ask(page, "show it")
        await answered(page)
        for view in ("chat", "settings", "engine", "code"):
            if view != "chat" or width < 900:
                await page.click(f"#tab-{view}")
            assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth"), view
            shot = await page.screenshot(path=tmp_path / f"{view}.png")
            assert len(shot) > 5000
        background = await page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == {"light": "rgb(250, 249, 246)", "dark": "rgb(21, 21, 19)"}[scheme]
        await page.click("#theme")
        await page.click("#theme")  # auto, light, dark
        await page.reload()
        assert await page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 21, 19)"

    options = {"color_scheme": scheme, "viewport": {"width": width, "height": 800}}
    drive(tmp_path, act, replies={"show it": SHOWN + "x" * 400}, page_options=options)
