"""Take the picture of a page that `deformconv look` wrote, in a browser: Chromium or Chrome, driven by Playwright.

Run from anywhere: python docs/draw_page.py look.html docs/images/look_page.jpg
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SIZE = {"width": 1200, "height": 800}


def draw(page: Path, picture: Path) -> None:
    browser_path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser_path is None:
        sys.exit("There is no Chromium or Chrome on the path: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path)
        tab = browser.new_page(viewport=SIZE, color_scheme="light")
        tab.goto(page.resolve().as_uri())
        tab.evaluate("window.deformconvLook.ready")
        tab.locator("#marks").focus()
        for key in ("3", "+"):  # through three layers, and closer
            tab.keyboard.press(key)
        tab.wait_for_timeout(500)
        tab.screenshot(path=picture, type="jpeg", quality=90)
        browser.close()


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
