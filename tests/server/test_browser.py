"""The playground in a real headless Chromium."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from specplug import AsyncLLM
from support.serving import Live, live

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.slow
CHAIN = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1}
TREES = {"method": "eagle3", "model": "tiny", "num_speculative_tokens": 4, "tree_total_tokens": 8}
REPEATS = "x = [0, 1, 0, 1, 0, 1, 0, 1,"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's Chromium, or the one that playwright installed."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    with api.sync_playwright() as play:
        system = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        try:
            launched = play.chromium.launch(executable_path=system, args=["--no-sandbox"])
        except api.Error as error:
            pytest.skip(f"no Chromium can be started (apt install chromium): {str(error).splitlines()[0]}")
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def engine() -> Iterator[AsyncLLM]:
    """Chains of ngram first, then trees of eagle3."""
    config = {**CHAIN, "prompt_lookup_min": 2, "fallback": TREES}
    with AsyncLLM("tiny", speculative_config=config, memory="384MiB", max_num_seqs=4, compile=False) as started:
        yield started


@pytest.fixture(scope="module")
def server(engine: AsyncLLM) -> Iterator[Live]:
    with live(engine) as running:
        yield running


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens the playground of a server; anything that goes wrong in the page fails the test."""
    wrong: list[str] = []
    contexts = []

    def start(url: str, *, expects_errors: bool = False, **options: object) -> Page:
        context = browser.new_context(**options)  # type: ignore[arg-type]
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "console", lambda message: message.type == "error" and not expects_errors and wrong.append(message.text)
        )
        page.on("request", lambda request: request.url.startswith((url, "data:")) or wrong.append(request.url))
        page.goto(url)
        return page

    yield start
    for context in contexts:
        context.close()
    assert not wrong


def run(page: Page, prompt: str, **fields: str) -> None:
    """Fills the form, runs, and waits for the end."""
    page.fill("#text", prompt)
    for name, value in fields.items():
        page.fill(f"#{name.replace('_', '-')}", value)
    page.click("#run")
    wait_for(page, "#status", "Done")


def wait_for(page: Page, selector: str, text: str) -> None:
    from playwright.sync_api import expect

    expect(page.locator(selector)).to_contain_text(text, timeout=60_000)


def test_tokens_show_who_drafted_them(open_page: Callable[..., Page], server: Live) -> None:
    """Two runs side by side: the same text; drafted tokens in the first alone; the legend names the drafters."""
    page = open_page(server.url)
    wait_for(page, "#about", "tiny with ngram, then eagle3")
    page.check("#compare")
    run(page, REPEATS, max_tokens="32")
    first, second = page.locator(".pane").all()
    assert first.locator(".token").all_text_contents() == second.locator(".token").all_text_contents()
    assert first.locator(".token").count() == 32
    assert first.locator(".token.m0").count() > 0
    assert second.locator(".token.m0, .token.m1").count() == 0
    wait_for(page, "#status", "the same text")
    assert page.locator("#legend").inner_text().count("drafted by") == 2
    styles = page.locator("#legend .token").evaluate_all(
        "all => all.map(each => getComputedStyle(each).textDecorationStyle)"
    )
    assert styles == ["solid", "solid", "dashed"]  # the first one has no line at all
    assert page.locator("#legend .token").first.evaluate("each => getComputedStyle(each).textDecorationLine") == "none"
    figures = first.locator(".figures dd").all_inner_texts()
    assert 1 < float(figures[0]) <= 5
    assert float(figures[1]) > 0
    assert figures[2].endswith("ms")
    server.wait_idle()
    run(page, REPEATS, max_tokens="32")  # by now it was measured what plain decoding takes
    figures = page.locator(".pane").first.locator(".figures dd").all_inner_texts()
    assert figures[3].endswith("ms")
    assert re.fullmatch(r"\W \d+\.\d\d", figures[4])


def test_a_step_is_shown_as_a_tree_and_as_a_table(open_page: Callable[..., Page], server: Live) -> None:
    page = open_page(server.url)
    run(page, "class Stack:\n    def __init__(self):\n", max_tokens="48")
    pane = page.locator(".pane").first
    page.focus(".text")
    tree = re.compile(r"Step \d+: .* drafted by eagle3 \(a tree\)")
    for _ in range(48):
        if tree.match(pane.locator(".step h3").inner_text()):
            break
        page.keyboard.press("ArrowDown")
    assert tree.match(pane.locator(".step h3").inner_text())
    active = page.get_attribute(".text", "aria-activedescendant")
    assert page.get_attribute(f"#{active}", "aria-selected") == "true"
    pane.locator(".step summary").click()
    parents = pane.locator(".step tbody tr td:nth-child(3)").all_inner_texts()
    assert len(parents) > 1
    assert len(set(parents)) < len(parents)  # siblings
    assert pane.locator(".step svg g.accepted, .step svg g.rejected").count() == len(parents)
    results = pane.locator(".step tbody tr td:nth-child(6)").all_inner_texts()
    assert pane.locator(".step svg g.accepted").count() == results.count("accepted")
    assert all("%" in text for text in pane.locator(".step tbody tr td:nth-child(5)").all_inner_texts())


def test_pointing_at_a_token_shows_its_step(open_page: Callable[..., Page], server: Live) -> None:
    page = open_page(server.url)
    run(page, REPEATS, max_tokens="24")
    token = page.locator(".text .token.m0").last
    token.hover()
    wait_for(page, ".step h3", "drafted by ngram")
    assert "drafted by ngram and accepted" in page.locator(".step p").first.inner_text()
    assert "active" in (token.get_attribute("class") or "")


def test_stop_aborts_the_request(open_page: Callable[..., Page], server: Live) -> None:
    page = open_page(server.url)
    page.fill("#text", REPEATS)
    page.fill("#max-tokens", "1500")
    page.fill("#draft-a", "0")
    page.press("#text", "Control+Enter")
    page.locator(".text .token").first.wait_for()
    page.click("#stop")
    wait_for(page, "#status", "Stopped")
    server.wait_idle()
    assert 0 < page.locator(".text .token").count() < 1500


def test_a_conversation_goes_on(open_page: Callable[..., Page], server: Live) -> None:
    page = open_page(server.url)
    page.check("[value=chat]")
    page.fill("#system", "Be brief.")
    run(page, "hello", max_tokens="6")
    assert page.locator("#conversation li").count() == 2
    run(page, "again", max_tokens="6")
    items = page.locator("#conversation li").all_inner_texts()
    assert [item.split(":")[0] for item in items] == ["user", "assistant", "user", "assistant"]
    assert page.locator(".text .prompt").inner_text().startswith("<system>Be brief.\n<user>hello\n<assistant>")
    page.click("#clear")
    assert page.locator("#conversation li").count() == 0


def test_errors_are_shown(open_page: Callable[..., Page], server: Live) -> None:
    page = open_page(server.url, expects_errors=True)
    page.fill("#text", "")
    page.click("#run")
    wait_for(page, "#status", "the prompt is empty")
    assert "error" in (page.get_attribute("#status", "class") or "")


def test_a_key_is_asked_for(open_page: Callable[..., Page], engine: AsyncLLM) -> None:
    with live(engine, api_keys=("secret",)) as guarded:
        page = open_page(guarded.url, expects_errors=True)
        wait_for(page, "#about", "needs an API key")
        page.get_by_label("API key").fill("secret")
        page.get_by_role("button", name="Use it").click()
        wait_for(page, "#about", "tiny with")
        run(page, REPEATS, max_tokens="4")
        assert page.locator(".text .token").count() == 4


def test_themes(open_page: Callable[..., Page], server: Live) -> None:
    """The system's scheme is followed until the button says otherwise; that is remembered."""
    page = open_page(server.url, color_scheme="dark")
    shade = "body => getComputedStyle(body).backgroundColor"
    dark = page.locator("body").evaluate(shade)
    page.get_by_role("button", name="Theme: system").click()
    light = page.locator("body").evaluate(shade)
    assert dark != light
    page.reload()
    assert page.locator("body").evaluate(shade) == light


def test_everything_has_a_name_and_can_be_reached_by_key(open_page: Callable[..., Page], server: Live) -> None:
    page = open_page(server.url)
    wait_for(page, "#about", "tiny")
    unnamed = page.locator("input, textarea, button, [role=listbox]").evaluate_all(
        "all => all.filter(each => !(each.labels?.length || each.ariaLabel || each.textContent.trim())).map(each => each.id)"
    )
    assert unnamed == []
    reached = set()
    for _ in range(20):
        page.keyboard.press("Tab")
        focus = "() => document.activeElement.id || document.activeElement.name || document.activeElement.className"
        reached.add(page.evaluate(focus))
    assert {"theme", "mode", "text", "draft-a", "temperature", "max-tokens", "compare", "run"} <= reached
