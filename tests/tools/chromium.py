"""Finds a Chromium on this machine."""

import os
import shutil


def find_chromium() -> str | None:
    """The path in the environment variable CHROMIUM, or the first of the usual names on the PATH."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
