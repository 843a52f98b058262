"""Draw reports: python -m src.report output/<run> [output/<another> ...]"""

import sys
from pathlib import Path

import tyro

from src.errors import InputError
from src.report.page import MAX_COMPLETIONS, write_report
from src.report.reader import read_run


def main(runs: tyro.conf.Positional[list[Path]], output: Path | None = None) -> Path:
    """Draw the report of a run, finished or not, or of several runs with their curves in the same figures.

    Args:
        runs: Folders of the runs, such as output/<run>.
        output: The file to write. The default is report.html in the run's folder or, if there are several
            runs, in the parent folder of the first one.

    Returns:
        The file that was written.

    Raises:
        InputError: A folder does not hold a run, or the file cannot be written.
    """
    if not runs:
        raise InputError("no run given; pass at least one folder, output/<run>")
    file = output or (runs[0] if len(runs) == 1 else runs[0].parent) / "report.html"
    try:
        write_report([read_run(folder, MAX_COMPLETIONS // len(runs)) for folder in runs], file)
    except OSError as error:
        raise InputError(
            f"--output {file}: cannot be written ({error.strerror}); choose another file"
        ) from None
    print(f"wrote {file}")
    return file


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)  # the status of an invalid flag
