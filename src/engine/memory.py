"""Estimates a run's memory before anything loads, halves batches if it runs out, and reuses freed blocks."""

import contextlib
import ctypes
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import psutil
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers import PreTrainedModel

from src.console import say, warn
from src.engine import architecture, cuda_llama, llama, static_decoder
from src.engine.logprobs import PASS_COST
from src.engine.static_decoder import cache_columns
from src.engine.token_log_probs import KEPT_LOGITS, vocabulary_block
from src.errors import InputError

T = TypeVar("T")

# Bytes taken by Python and its libraries or, on a GPU, by the context and the kernels.
PROGRAM = {"cpu": 0.9e9, "cuda": 0.8e9, "mps": 0.5e9}
# What CUDA's libraries say when they cannot allocate memory of their own.
OUT_OF_MEMORY = (
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDA driver error: out of memory",
)
CGROUP = Path("/sys/fs/cgroup")  # this process's cgroup, as containers mount it
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # <malloc.h>


@dataclass(frozen=True)
class ModelSize:
    """The sizes of a model that the memory plan needs. Bytes refer to the dtype in which it was measured."""

    weights: int
    trained: int  # how many of the weights are trained
    itemsize: int  # bytes per weight
    activation: float  # bytes that a forward pass keeps for the backward pass, per token
    # The same with gradient checkpointing: one layer's activations, and each layer's float32 input.
    checkpointed: float
    cache: float  # bytes of keys and values, per token
    vocabulary: int
    # Whether a question's completions share one copy of its prompt in a pass, and nothing is padded
    # (llama.py, cuda_llama.py).
    flat: bool = True


def measure(skeleton: PreTrainedModel, device: str) -> ModelSize:
    """Measure a causal language model that will train on a device, without its weights.

    The activations of `cuda_llama` are counted, and those of any other model measured in a forward pass on
    the meta device. That overestimates llama.py, whose forward pass keeps only half as many activations.

    Args:
        skeleton: A model from `models.skeleton`, in the dtype in which it will compute.
        device: cpu, cuda or mps.
    """
    config = skeleton.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    on_gpu = device == "cuda" and skeleton.dtype == torch.bfloat16 and architecture.is_llama_like(skeleton)
    activation = cuda_llama.activation_bytes(config) if on_gpu else kept_by_transformers(skeleton)
    return ModelSize(
        weights=skeleton.num_parameters(),
        trained=skeleton.num_parameters(only_trainable=True),
        itemsize=skeleton.dtype.itemsize,
        activation=activation,
        # Each layer keeps its input: the stream in float32 and, in cuda_llama, what will be added to it.
        checkpointed=activation / config.num_hidden_layers
        + (6.0 if on_gpu else 4.0) * config.hidden_size * config.num_hidden_layers,
        cache=2.0
        * config.num_hidden_layers
        * heads
        * architecture.head_dim(config)
        * skeleton.dtype.itemsize,
        vocabulary=config.vocab_size,
        flat=on_gpu or (device == "cpu" and llama.has_kernels_for(skeleton)),
    )


def kept_by_transformers(skeleton: PreTrainedModel) -> float:
    """Bytes per token that transformers' own forward pass keeps for the backward pass."""
    config, tokens = skeleton.config, 16
    weights = {w.untyped_storage()._cdata for w in skeleton.parameters()}
    saved: dict[int, int] = {}  # bytes of each block that autograd keeps, except weights

    def note(tensor: torch.Tensor) -> torch.Tensor:
        block = tensor.untyped_storage()
        if block._cdata not in weights:
            saved[block._cdata] = block.nbytes()
        kept.append(tensor)  # kept alive to the end, so that no two blocks share an address
        return tensor

    kept: list[torch.Tensor] = []
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    # The mask is passed explicitly, because without one, transformers would look for padding.
    mask = torch.zeros(1, 1, tokens, tokens, dtype=skeleton.dtype, device="meta")
    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            skeleton.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    except Exception:  # OPT and MoE models read values, which meta tensors lack, but they can be trained
        # arXiv:2205.05198, equation 2
        saved = {0: tokens * 34 * config.hidden_size * config.num_hidden_layers * skeleton.dtype.itemsize}
    return sum(saved.values()) / tokens


@dataclass(frozen=True)
class Plan:
    """The choices that decide what a run keeps in memory on the device that trains."""

    policy: ModelSize
    device: str  # cpu, cuda or mps
    completions: int  # B
    group_size: int  # G
    micro_batch_size: int
    prompt_length: int  # tokens in the longest prompt
    completion_length: int  # tokens in the longest completion
    reference: bool  # whether a frozen copy of the policy is kept
    reward_weights: float = 0.0  # bytes
    reward_activations: float = 0.0  # bytes, while it scores
    reward_placement: str = "device"  # "offload": on the device only while scoring; "cpu": never
    gradient_checkpointing: bool = False

    def parts(self) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        """The bytes that stay in memory, and those that each phase adds. Only one phase runs at a time."""
        p = self.policy
        separate = p.itemsize < 4  # separate float32 master weights
        stays = {
            "program": PROGRAM[self.device],
            "policy": p.weights * p.itemsize,
            "trained weights": 4.0 * p.trained if separate else 0.0,
            "Adam": 8.0 * p.trained,
            "reference": p.weights * p.itemsize if self.reference else 0.0,
            "reward model": self.reward_weights if self.reward_placement == "device" else 0.0,
        }
        columns = self.prompt_length + self.completion_length
        # On a GPU, the cache is kept, because a CUDA graph holds its addresses (see static_decoder.py).
        on_gpu = self.device == "cuda"
        cache = self.completions * p.cache * (cache_columns(columns) if on_gpu else columns)
        kept = {"kept cache": cache if on_gpu else 0.0}
        block = min(vocabulary_block(self.device), p.vocabulary)
        sampled = self.micro_batch_size * self.completion_length
        logits = (8.0 + p.itemsize) * sampled * block
        if self.device == "cpu" and not separate:
            logits += min(KEPT_LOGITS, 4.0 * sampled * p.vocabulary)
        activations = self.tokens() * (p.checkpointed if self.gradient_checkpointing else p.activation)
        # The sums of the gradients in float32. A pass's own gradients replace its activations.
        gradients = 4.0 * p.trained + max(0.0, self.pass_gradients() - logits - activations)
        packed = p.weights * p.itemsize if self.device == "cpu" else 0.0  # decoder.LlamaDecoder
        phases = {
            "rollout": {
                "cache": cache,
                "logits": 16.0 * self.completions * p.vocabulary,  # four float32 tensors (sampler._pick)
                "packed weights": packed,
            },
            "score": {
                "reward model": self.reward_weights if self.reward_placement == "offload" else 0.0,
                "activations": self.reward_activations if self.reward_placement != "cpu" else 0.0,
                **kept,
            },
            "update": {"gradients": gradients, "logits": logits, "activations": activations, **kept},
        }
        return stays, phases

    def tokens(self) -> int:
        """Tokens of the largest pass of the update, including padding."""
        completions, prompt, completion = self.micro_batch_size, self.prompt_length, self.completion_length
        if self.policy.flat:  # one prompt for each group
            return completions * completion + -(-completions // self.group_size) * prompt
        # Each completion has a row of its own, or fewer rows hold them. In that case, padding is limited by
        # what it would cost to compute each row in a pass of its own (logprobs.micro_batches).
        fewer = completions * completion + (completions - 1) * (prompt + PASS_COST) - PASS_COST
        return max(completions * (prompt + completion), fewer)

    def pass_gradients(self) -> float:
        """Bytes of the gradients of one pass, before they are added to the sums in float32."""
        return float(self.policy.trained * self.policy.itemsize if self.policy.itemsize < 4 else 0)

    def min_bytes(self) -> float:
        """Bytes without which a run cannot start: everything that does not depend on completion lengths."""
        stays, phases = self.parts()
        gradients = 4.0 * self.policy.trained + self.pass_gradients()
        added = max(gradients, phases["score"]["reward model"])
        return max(self.loading(), sum(stays.values()) + added)

    def loading(self) -> float:
        """Bytes needed while the policy loads, in float32, before it is rounded to its compute dtype."""
        return PROGRAM[self.device] + 4.0 * (self.policy.weights + self.policy.trained)

    def max_bytes(self) -> float:
        """Bytes needed if every completion has the maximum length."""
        stays, phases = self.parts()
        added = max(sum(parts.values()) for parts in phases.values())
        return max(self.loading(), sum(stays.values()) + added)

    def describe(self, free: float) -> str:
        """One line with the total, the free memory and each part, in GB."""
        stays, phases = self.parts()
        largest = max(phases, key=lambda name: sum(phases[name].values()))
        parts = stays | {f"{name} of the {largest}": size for name, size in phases[largest].items()}
        shown = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items() if size >= 5e7)
        needed = f"up to {self.max_bytes() / 1e9:.1f} of the {free / 1e9:.1f} GB free on {self.device}"
        return f"memory: {needed} ({shown})"


def check_fits(plan: Plan, free: float, with_lora: Callable[[], ModelSize], eight_bit: float) -> None:
    """Print how much memory a run needs. Refuse a run that cannot fit, and warn about one that may not.

    Args:
        plan: The run's plan.
        free: Free bytes on the device.
        with_lora: Measures the policy with `--lora-rank 16`; only called if something does not fit.
        eight_bit: Bytes of the reward model in int8; 0 if int8 is not an option.

    Raises:
        InputError: The run cannot fit. The message names flags that would make it fit.
    """
    say(plan.describe(free))
    if plan.max_bytes() <= free:
        return
    lora = with_lora() if plan.policy.trained == plan.policy.weights else None
    found = ways_out(plan, lora, free, eight_bit)
    way_out = "use a smaller --model-name or --max-new-tokens"
    if found:
        way_out = f"options that fit at full length: {', '.join(found)}"
    if plan.min_bytes() > free:
        raise InputError(
            f"memory: the run needs {plan.min_bytes() / 1e9:.1f} GB on {plan.device} before the first token, "
            f"but only {free / 1e9:.1f} GB are free; {way_out}"
        )
    warn(
        f"memory may run out: completions of full length need {plan.max_bytes() / 1e9:.1f} GB on "
        f"{plan.device}, but only {free / 1e9:.1f} GB are free; {way_out}"
    )


def ways_out(plan: Plan, with_lora: ModelSize | None, free: float, eight_bit: float) -> list[str]:
    """The shortest sets of flags with which the run fits at full length, each with the memory that it needs.

    Each flag is tried on its own and in combination with LoRA.
    """
    tries: dict[str, Plan] = {}
    if plan.reference:
        tries["--kl-weight 0"] = replace(plan, reference=False)
    if plan.micro_batch_size > 1:
        tries["--micro-batch-size 1"] = replace(plan, micro_batch_size=1)
    if not plan.gradient_checkpointing:
        tries["--gradient-checkpointing"] = replace(plan, gradient_checkpointing=True)
    if plan.reward_weights and plan.reward_placement == "device":
        if plan.device == "cuda" and eight_bit:  # a model in int8 cannot be offloaded
            tries["--reward-model-device offload"] = replace(plan, reward_placement="offload")
        if plan.device == "cuda":
            tries["--reward-model-device cpu"] = replace(plan, reward_placement="cpu")
        if eight_bit:
            tries["--reward-model-8bit"] = replace(plan, reward_weights=eight_bit)
    if plan.reward_weights:
        tries["--reward-model-name none"] = replace(plan, reward_weights=0.0)
    if with_lora:
        tries |= {
            f"--lora-rank 16 {flags}".strip(): replace(changed, policy=with_lora, reference=False)
            for flags, changed in {"": plan, **tries}.items()
        }
    fits = {flags: changed.max_bytes() for flags, changed in tries.items() if changed.max_bytes() <= free}
    shortest = min((flags.count("--") for flags in fits), default=0)
    return [f"{flags} ({size / 1e9:.1f} GB)" for flags, size in fits.items() if flags.count("--") == shortest]


class BatchSize:
    """The number of completions in a batch. It is halved whenever memory runs out, and never raised again."""

    def __init__(self, size: int):
        self.size = size

    def fit(self, compute: Callable[[int], T]) -> T:
        """Run compute(size) with `fit_memory`, and remember the size that worked."""
        result, self.size = fit_memory(compute, self.size)
        return result


def fit_memory(compute: Callable[[int], T], size: int) -> tuple[T, int]:
    """Run compute(size), and halve the size each time memory runs out.

    Args:
        size: Number of completions to process at once.

    Returns:
        The result, and the size that worked.

    Raises:
        RuntimeError: Memory runs out even for a single completion, or `compute` fails for another reason.
    """
    while True:
        try:
            return compute(size), size
        except RuntimeError as error:
            if size == 1 or not is_out_of_memory(error):
                raise
        # This is outside the handler, because its traceback would keep the failed attempt's tensors alive.
        static_decoder.release()  # frees the decoder's cache, which is as large as the failed batch
        clear_device_cache(garbage_collection=True)
        warn(f"out of memory; retrying with {size // 2} completions at a time instead of {size}")
        size //= 2


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host ran out of memory."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    return should_reduce_batch_size(error) or any(words in str(error) for words in OUT_OF_MEMORY)


def free_memory(device: torch.device) -> float:
    """Bytes that this process can still allocate on a device; on the CPU, within its container's limit."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return float(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    free = float(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):  # there is no such file, or no limit ("max")
        limit, used = (float((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        # Cached files count as free, because the system drops them when memory is needed.
        files = float(stat["active_file"]) + float(stat["inactive_file"])
        free = min(free, limit - used + files)
    return free


def bound_product_cache() -> None:
    """Let oneDNN cache 256 compiled matrix products instead of 1,024. Call this before the first product.

    Each one takes 0.6 MB, and training keeps producing new shapes, so with 1,024 of them a run on a CPU would
    grow by half a GB in its first hundred steps. A single pass has fewer than a hundred shapes. If
    ONEDNN_PRIMITIVE_CACHE_CAPACITY is set, it takes precedence.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")


def keep_freed_memory() -> None:
    """Let glibc reuse large blocks instead of returning each one to the system. Without glibc, do nothing.

    By default, every tensor over 32 MB is mapped afresh, and its pages are zeroed and faulted in on first
    touch. On a CPU, that takes a sixth of the update's time, and most of the time in which the sampler
    chooses tokens (benchmarks/NOTES.md).
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, -1)  # never trim
    libc.mallopt(M_TOP_PAD, 64 * 2**20)
