"""Load the policy, its reference and its tokenizer, and prepare them for training."""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.utils.checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from src.console import phase, say
from src.engine import architecture, kernels
from src.engine.offload import Offloaded
from src.errors import InputError, first_line
from src.hub import base_of, is_adapter, resolve

if TYPE_CHECKING:
    from peft import PeftModel  # at run time imported only where it is used, because it takes a second

T = TypeVar("T")
# A configuration can ask for other outputs than those that are read here.
PLAIN_OUTPUT = dict(return_dict=True, output_attentions=False, output_hidden_states=False)
AutoModel = type[AutoModelForCausalLM] | type[AutoModelForSequenceClassification]


def pick_dtype(device: torch.device, dtype: str) -> torch.dtype:
    """The dtype that models compute in. "auto" means bfloat16 if the hardware multiplies it natively.

    Raises:
        InputError: `dtype` is neither "auto", "bfloat16" nor "float32".
    """
    if dtype == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            onednn = device.type == "cpu" and torch.backends.mkldnn.is_available()
            # oneDNN may have been told not to use them (ONEDNN_MAX_CPU_ISA), and then bfloat16 is very slow.
            used = onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()
            native = used and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
        return torch.bfloat16 if native else torch.float32
    if dtype not in ("bfloat16", "float32"):
        raise InputError(
            f"dtype={dtype!r}: must be auto, bfloat16 or float32 (float16 needs loss scaling, which is not "
            "implemented)"
        )
    return getattr(torch, dtype)


# ----------------------------------------------------------------------------------------------------------
# Tokenizer and prompts


def load_tokenizer(model_name: str, flag: str = "--model-name") -> PreTrainedTokenizerBase:
    """Load the policy's tokenizer.

    Args:
        model_name: Hub name, local folder, or "embedded".
        flag: The flag that the name came from, for messages.

    Raises:
        InputError: The tokenizer cannot be found or loaded, or has no chat template.
    """
    path = resolve(model_name, flag)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # a folder made elsewhere can be broken in any way
        raise InputError(
            f"{flag} {model_name}: no tokenizer could be loaded ({first_line(error)}); "
            "save one into the folder with tokenizer.save_pretrained"
        ) from None
    if tokenizer.chat_template is None:
        raise InputError(
            f"{flag} {model_name}: its tokenizer has no chat template, so it cannot be asked questions; use "
            "the chat or instruct version of the model, or set tokenizer.chat_template and save the "
            "tokenizer with save_pretrained"
        )
    return tokenizer


def conversation(
    question: str, system_prompt: str | None, response: str | None = None
) -> list[dict[str, str]]:
    """Messages for a chat template: the system prompt if any, the question, and the response if any."""
    messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
    messages.append({"role": "user", "content": question})
    return messages + ([{"role": "assistant", "content": response}] if response is not None else [])


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end a completion, from the tokenizer, the generation config and the chat template.

    Llama 3 has several. In some models, the template ends a turn with a token that neither of the others
    names, so completions would never end.

    Raises:
        InputError: The model has no end token.
    """
    eos = model.generation_config.eos_token_id
    ids = set(eos if isinstance(eos, list) else [eos]) | {tokenizer.eos_token_id}
    ids.discard(None)
    turn_end = end_of_turn(tokenizer)
    if turn_end is not None and turn_end not in ids:
        ids.add(turn_end)
        token = tokenizer.convert_ids_to_tokens(turn_end)
        say(f"completions also end at {token!r}, which ends a turn in the chat template")
    if not ids:
        raise InputError(
            "the model has no end token; set tokenizer.eos_token and save the tokenizer with save_pretrained"
        )
    return sorted(ids)


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token right after an answer in the chat template; None if there is none."""
    try:
        messages = conversation("question", None, "answer")
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:  # a template that takes no answers
        return None
    after = text.rpartition("answer")[2].lstrip()
    special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    special |= {str(t): i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    found = [token for token in special if token and after.startswith(token)]
    return special[max(found, key=len)] if found else None


# ----------------------------------------------------------------------------------------------------------
# The policy


def skeleton(
    path: str, auto_class: AutoModel, dtype: torch.dtype, flag: str, **config: int
) -> PreTrainedModel:
    """Build a model without its weights, on the meta device, so that it can be measured before it loads.

    Args:
        path: From `resolve`. Only its configuration is read.
        auto_class: The class that loads such a model.
        dtype: The dtype it will compute in.
        flag: The flag and value that the path came from, for messages.
        config: Settings that override those in the configuration.

    Raises:
        InputError: This version of transformers cannot read the configuration.
    """
    try:
        settings = AutoConfig.from_pretrained(path, **config)
        with torch.device("meta"):
            return auto_class.from_config(settings, dtype=dtype)
    except Exception as error:
        raise InputError(f"{flag}: its configuration could not be read ({first_line(error)})") from None


def policy_skeleton(model_name: str, flag: str, dtype: torch.dtype, max_length: int) -> PreTrainedModel:
    """The policy without its weights.

    Raises:
        InputError: The model cannot be found, or has fewer positions than `max_length`.
    """
    policy = skeleton(
        base_of(resolve(model_name, flag), flag), AutoModelForCausalLM, dtype, f"{flag} {model_name}"
    )
    positions = getattr(architecture.text_config(policy), "max_position_embeddings", max_length)
    if max_length > positions:
        raise InputError(
            f"--max-length {max_length}: must be at most the {positions} positions of {model_name}"
        )
    return policy


def load_policy(model_name: str, device: torch.device, flag: str = "--model-name") -> PreTrainedModel:
    """Load a policy in float32 and eval mode, so that sampling and training see the same distribution.

    Args:
        model_name: Hub name, local folder, or "embedded". For the folder of a LoRA adapter, its base model is
            loaded and the adapter merged into it.
        device: Where the model computes.
        flag: The flag that the name came from, for messages.

    Raises:
        InputError: The model cannot be found or loaded, or has no plain output head.
    """
    path = resolve(model_name, flag)
    base = base_of(path, flag)
    try:
        # output_loading_info makes from_pretrained return a pair, which its type hints do not say.
        both: Any = AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.float32, output_loading_info=True, **PLAIN_OUTPUT
        )
        model, loading = both
        if is_adapter(path):
            model = merge_adapter(model, path)
    except Exception as error:
        raise InputError(
            f"{flag} {model_name}: the model could not be loaded ({first_line(error)})"
        ) from None
    if loading["missing_keys"]:
        missing = ", ".join(sorted(loading["missing_keys"])[:3])
        raise InputError(f"{flag} {model_name}: not a causal language model; it has no weights for {missing}")
    try:
        model.generation_config.validate(strict=True)
    except ValueError:  # for example a temperature without do_sample, which loads but cannot be saved
        model.generation_config.do_sample = True
    # With a padding_idx, the padding token, which is often a stop token, would get no gradient.
    model.get_input_embeddings().padding_idx = None
    check_head(model)
    return model.to(device).eval()


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Reject a model whose logits are not simply its output head applied to its last hidden state.

    `logprobs.completion_log_probs` applies the head's weights itself. If the model also caps or scales its
    logits (Gemma 2, Cohere), the log-probs would be silently wrong.

    Raises:
        InputError: The model's logits are not its head's output, or it cannot compute any.
    """
    head = model.get_output_embeddings()
    ids = torch.arange(1, 5, device=model.device)[None] % architecture.text_config(model).vocab_size
    try:
        logits = model(ids).logits
        hidden = architecture.backbone(model)(ids).last_hidden_state
        by_hand = head(hidden) if head is not None and head.weight.shape[1] == hidden.shape[2] else None
    except Exception as error:  # models made elsewhere can raise anything
        raise InputError(
            f"{type(model).__name__} cannot compute log-probs ({first_line(error)}); use another model"
        ) from None
    if type(head) is not torch.nn.Linear:
        kind = type(head).__name__
        raise InputError(
            f"the output head of {type(model).__name__} is not a linear layer but {kind}; use another model"
        )
    tolerance = 1e-3 * float(logits.abs().max())
    if by_hand is None or not torch.allclose(logits, by_hand, rtol=1e-3, atol=tolerance):
        raise InputError(
            f"{type(model).__name__} does more than apply its output head (a soft cap, a scale or a "
            "transform), which is not supported; use another model"
        )


@phase("load the policy")
def load_trainable(
    model_name: str, device: torch.device, dtype: torch.dtype, lora_rank: int
) -> tuple[PreTrainedModel, PeftModel | None, str]:
    """Load the policy in float32, and add a LoRA adapter if `lora_rank` is not 0. Prints what was loaded.

    Args:
        dtype: The dtype that the policy will compute in, for the message.

    Returns:
        The policy, the adapter's wrapper or None, and the fingerprint of the policy as it was loaded.
    """
    instead = "" if "tinyllama" in model_name.lower() else f" in its place: {model_name}"
    say(f"Loading TinyLlama model...{instead}")
    policy = load_policy(model_name, device)
    loaded = fingerprint(policy)
    computes = f"computes in {str(dtype).removeprefix('torch.')} on {device.type}"
    say(f"policy: {policy.num_parameters() / 1e6:.1f} million weights, trained in float32, {computes}")
    if device.type == "cpu" and not kernels.are_compiled():
        say(kernels.ABSENT)
    adapter = add_lora(policy, lora_rank) if lora_rank else None
    if adapter:
        trained = adapter.get_nb_trainable_parameters()[0]
        say(f"LoRA of rank {lora_rank}: {trained / 1e6:.2f} million weights are trained")
    return policy, adapter, loaded


def fingerprint(model: PreTrainedModel) -> str:
    """A hash that identifies a model: names, shapes and 256 evenly spaced values of every parameter."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        values = weight.flatten()[:: max(1, weight.numel() // 256)].detach().float().cpu().numpy()
        digest.update(f"{name} {tuple(weight.shape)}".encode() + values.tobytes())
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------------
# LoRA, gradient checkpointing, the reference


def add_lora(model: PreTrainedModel, rank: int) -> PeftModel:
    """Freeze a model and add a trainable LoRA adapter (arXiv:2106.09685) to all linear layers but the head.

    Args:
        model: Changed in place. From now on it computes with the adapter, whose output is 0 at first.
        rank: Rank of the adapter; its scale is 2.

    Returns:
        The wrapper that saves, merges and disables the adapter.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config).eval()


def merge_adapter(model: PreTrainedModel, folder: str | Path) -> Any:
    """The model with a saved LoRA adapter merged into its weights."""
    from peft import PeftModel

    # The return type is Any because transformers' types lack model.to(dtype).
    return PeftModel.from_pretrained(model, folder).merge_and_unload()


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Recompute each layer in its backward pass (gradient checkpointing, arXiv:1604.06174).

    This saves memory and costs time. transformers recomputes layers only in training mode, which could enable
    dropout, so each layer is wrapped here. `llama.py` only reads the flag that is set here.

    Raises:
        InputError: The model's layers do not support it.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise InputError(
            f"--gradient-checkpointing: the layers of {type(model).__name__} do not support it; "
            "leave the flag out"
        )
    for layer in layers:
        layer.gradient_checkpointing = True
        layer.forward = functools.partial(_checkpointed, layer.forward)


def _checkpointed(forward: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return torch.utils.checkpoint.checkpoint(forward, *args, use_reentrant=False, **kwargs)


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model as it is now, without gradients."""
    frozen = copy.deepcopy(model).requires_grad_(False).eval()
    if architecture.is_llama_like(frozen) and architecture.has_plain_layers(frozen):
        architecture.join_weights(frozen)
    return frozen


class Reference:
    """The frozen model that the KL term compares the policy with.

    Args:
        model: The frozen model itself, or with LoRA the policy.
        adapter: The policy's adapter, which is disabled while the reference computes.
        offload: Keep the model in host memory, except while it computes.
    """

    def __init__(self, model: PreTrainedModel, adapter: PeftModel | None = None, offload: bool = False):
        self._model, self._adapter = model, adapter
        self._offloaded = Offloaded(model.parameters, model.device) if offload else None

    @contextmanager
    def model(self) -> Iterator[PreTrainedModel]:
        """The model to compute with, for use only inside the `with` block."""
        with (
            self._offloaded.on_device() if self._offloaded else nullcontext(),
            self._adapter.disable_adapter() if self._adapter else nullcontext(),
        ):
            yield self._model


def make_reference(policy: PreTrainedModel, adapter: PeftModel | None, offload: bool = False) -> Reference:
    """The reference: a copy of the policy as it is now, or with LoRA the policy without its adapter.

    Args:
        offload: Keep the copy in host memory, except while it computes.
    """
    return Reference(policy, adapter) if adapter else Reference(frozen_copy(policy), offload=offload)
