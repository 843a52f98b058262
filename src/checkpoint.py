"""Checkpoints: folders that any tool of the Hugging Face family loads as they are, and that are never half there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedModel, PreTrainedTokenizerBase

if TYPE_CHECKING:
    from peft import PeftModel


def save_checkpoint(run_folder: Path, name: str, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Write weights and tokenizer to `run_folder`/`name`; of a model with a LoRA adapter, the adapter alone.

    Written to a hidden folder beside it and renamed, so that the folder is whole whenever it is there, whatever interrupts
    the run.

    Returns:
        The folder.
    """
    folder = run_folder / name
    aside = run_folder / f".{name}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    aside.rename(folder)
    return folder
