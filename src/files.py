"""Write files and folders atomically: a reader sees the old or the new version, never a partial one."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def write_text(file: Path, text: str, errors: str = "strict") -> None:
    """Write a text file in UTF-8, synced to the disk before it replaces the old one.

    Args:
        errors: What to do with characters that UTF-8 cannot encode, as for `open`.
    """
    partial = file.with_name(f".{file.name}.partial")
    with partial.open("w", encoding="utf-8", errors=errors) as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    partial.replace(file)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Create a hidden folder that replaces `folder` once everything written into it is on the disk."""
    partial, old = folder.with_name(f".{folder.name}.partial"), _old(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        for path in [*partial.rglob("*"), partial]:
            _sync(path)
        if folder.exists():  # left behind by an earlier attempt
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        partial.rename(folder)
        _sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def remove_folder(folder: Path) -> None:
    """Delete a folder without ever leaving a partial folder under its name."""
    old = _old(folder)
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    shutil.rmtree(old)


def remove_leftovers(folder: Path) -> None:
    """Delete the half-written files and folders that a killed process left in a folder."""
    for hidden in [*folder.glob(".*.partial"), *folder.glob(".*.old")]:
        shutil.rmtree(hidden, ignore_errors=True)


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
