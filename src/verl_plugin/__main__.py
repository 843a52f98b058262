"""python -m src.verl_plugin convert | calibrate | command"""

import sys

import tyro

from src.errors import InputError
from src.verl_plugin.command import calibrate, command, convert

if __name__ == "__main__":
    try:
        tyro.extras.subcommand_cli_from_dict({"convert": convert, "calibrate": calibrate, "command": command})
    except InputError as error:
        sys.exit(f"error: {error}")
