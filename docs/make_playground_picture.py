"""Takes docs/images/playground.png: a real run in a headless Chromium. Needs playwright and Chromium.

specplug serve tiny --port 8123 --speculative-config \
        '{"method": "ngram", "prompt_lookup_max": 4, "prompt_lookup_min": 2, "num_speculative_tokens": 4,
"fallback": {"method": "eagle3", "model": "tiny", "num_speculative_tokens": 4, "tree_total_tokens": 8}}' &
python docs/make_playground_picture.py http://127.0.0.1:8123 docs/images/playground.png
"""

from __future__ import annotations

import shutil
import sys

from playwright.sync_api import expect, sync_playwright


def main(url: str, file: str, scheme: str = "light") -> None:
    """Runs the page twice, so that the second run is warm, and takes the picture."""
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1240, "height": 1000}, color_scheme=scheme)  # type: ignore[arg-type]
        page.goto(url)
        expect(page.locator("#about")).to_contain_text("with")
        page.check("#compare")
        page.fill("#max-tokens", "112")
        for _ in range(2):
            page.click("#run")
            expect(page.locator("#status")).to_have_text("Run 1 of 2…")
            expect(page.locator("#status")).to_contain_text("Done", timeout=120_000)
        first, second = page.locator(".pane").all()
        tokens = first.locator(".token").all()
        for token in tokens[30:]:
            token.hover()
            heading = first.locator(".step h3").inner_text()
            if "tree" in heading and "0 accepted" not in heading:
                break
        second.locator(".token").nth(60).hover()
        page.screenshot(path=file, full_page=True)
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
