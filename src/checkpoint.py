"""Checkpoints: folders that any tool of the Hugging Face family loads as they are, and that are never half there."""

import shutil
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save_checkpoint(run_folder: Path, step: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Write weights and tokenizer to `run_folder`/step_<step>.

    Written to a hidden folder beside it and renamed, so that step_<step> is whole whenever it is there, whatever
    interrupts the run.

    Returns:
        The folder.
    """
    folder = run_folder / f"step_{step}"
    aside = run_folder / f".step_{step}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    aside.rename(folder)
    return folder
