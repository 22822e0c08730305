"""The browser that tests drive: one that the machine has, since Playwright's own would have to be downloaded."""

from __future__ import annotations

import shutil

__all__ = ["executable"]

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def executable() -> str | None:
    """The path of the first Chromium or Chrome that is found."""
    return next(filter(None, map(shutil.which, _NAMES)), None)
