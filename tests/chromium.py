"""Where a Chromium is, if there is one."""

import os
import shutil


def find_chromium() -> str | None:
    """The path in CHROMIUM, or the first of the usual names on the PATH."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
