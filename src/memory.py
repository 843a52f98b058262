"""Memory: what a run will need, estimated before anything loads, and what the process does with the memory that it frees."""

import contextlib
import ctypes
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedModel

from src.console import say
from src.errors import InputError
from src.logprobs import vocabulary_block
from src.static_decoder import cache_columns

PROGRAM = {"cpu": 0.9e9, "cuda": 0.8e9, "mps": 0.5e9}  # Python and its libraries; on a GPU the context and its kernels
CGROUP = Path("/sys/fs/cgroup")  # of this process, as containers mount it
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # <malloc.h>


@dataclass(frozen=True)
class ModelSize:
    """What the budget has to know of a model; bytes are for the dtype that it was measured in."""

    weights: int
    trained: int  # of the weights
    itemsize: int  # bytes of a weight
    activation: float  # bytes that a forward pass keeps for the backward pass, per token
    checkpointed: float  # the same with gradient checkpointing: one layer's, and what goes into each in float32
    cache: float  # bytes of keys and values, per token
    vocabulary: int


def measure(skeleton: PreTrainedModel) -> ModelSize:
    """Size up a causal language model by a forward pass without numbers; where llama.py computes it, it keeps half of that.

    Args:
        skeleton: On the meta device (`models.skeleton`), in the dtype that it will compute in.
    """
    config, tokens = skeleton.config, 16
    weights = {w.untyped_storage()._cdata for w in skeleton.parameters()}
    saved: dict[int, int] = {}  # bytes of each block that autograd keeps, the weights apart

    def note(tensor: torch.Tensor) -> torch.Tensor:
        block = tensor.untyped_storage()
        if block._cdata not in weights:
            saved[block._cdata] = block.nbytes()
        kept.append(tensor)  # alive to the end, so that no two blocks share an address
        return tensor

    kept: list[torch.Tensor] = []
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    mask = torch.zeros(1, 1, tokens, tokens, dtype=skeleton.dtype, device="meta")  # given, or transformers looks for padding
    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            skeleton.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    except Exception:  # a model that looks at numbers on its way (OPT, mixtures of experts): no reason not to train it
        rough = 34 * config.hidden_size * config.num_hidden_layers * skeleton.dtype.itemsize  # arXiv:2205.05198, equation 2
        saved = {0: tokens * rough}
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    activation = sum(saved.values()) / tokens
    return ModelSize(
        weights=skeleton.num_parameters(),
        trained=skeleton.num_parameters(only_trainable=True),
        itemsize=skeleton.dtype.itemsize,
        activation=activation,
        checkpointed=activation / config.num_hidden_layers + 4.0 * config.hidden_size * config.num_hidden_layers,
        cache=2.0 * config.num_hidden_layers * heads * head * skeleton.dtype.itemsize,
        vocabulary=config.vocab_size,
    )


@dataclass(frozen=True)
class Plan:
    """The choices that decide what a run keeps in memory, on the device that trains."""

    policy: ModelSize
    device: str  # cpu, cuda or mps
    completions: int  # B
    group_size: int  # G
    micro_batch_size: int
    prompt_length: int  # tokens of the longest
    completion_length: int  # tokens that one may have
    reference: bool  # a frozen copy of the policy
    reward_weights: float = 0.0  # bytes
    reward_placement: str = "device"  # "offload": there while scoring; "cpu": never there
    gradient_checkpointing: bool = False

    def parts(self) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        """Bytes of what stays, and of what each phase adds: rollout, score and update come one after the other."""
        p = self.policy
        separate = p.itemsize < 4  # float32 weights to train beside the ones that compute
        stays = {
            "program": PROGRAM[self.device],
            "policy": p.weights * p.itemsize,
            "trained weights": 4.0 * p.trained if separate else 0.0,
            "Adam": 8.0 * p.trained,
            "reference": p.weights * p.itemsize if self.reference else 0.0,
            "reward model": self.reward_weights if self.reward_placement == "device" else 0.0,
        }
        prompts = -(-self.micro_batch_size // self.group_size)  # completions of a question share one (logprobs)
        tokens = self.micro_batch_size * self.completion_length + prompts * self.prompt_length
        columns = self.prompt_length + self.completion_length
        on_gpu = self.device == "cuda"  # there the cache's addresses are part of a graph, so it stays (static_decoder)
        cache = self.completions * p.cache * (cache_columns(columns) if on_gpu else columns)
        kept = {"kept cache": cache if on_gpu else 0.0}
        block = vocabulary_block(self.device)
        phases = {
            "rollout": {
                "cache": cache,
                "logits": 16.0 * self.completions * p.vocabulary,  # four float32 tensors (sampler._pick)
                "packed weights": p.weights * p.itemsize if self.device == "cpu" else 0.0,  # decoder.LlamaDecoder
            },
            "score": {"reward model": self.reward_weights if self.reward_placement == "offload" else 0.0, **kept},
            "update": {
                "gradients": p.trained * (4.0 + (p.itemsize if separate else 0.0)),
                "logits": (8.0 + p.itemsize) * self.micro_batch_size * self.completion_length * min(block, p.vocabulary),
                "activations": tokens * (p.checkpointed if self.gradient_checkpointing else p.activation),
                **kept,
            },
        }
        return stays, phases

    def least(self) -> float:
        """Bytes below which it certainly cannot run: without what depends on the length of the completions."""
        stays, phases = self.parts()
        return max(self.loading(), sum(stays.values()) + max(phases["update"]["gradients"], phases["score"]["reward model"]))

    def loading(self) -> float:
        """Bytes while the policy is loaded: in float32, before it is rounded to what it computes in."""
        return PROGRAM[self.device] + 4.0 * (self.policy.weights + self.policy.trained)

    def most(self) -> float:
        """Bytes where every completion is as long as it may be."""
        stays, phases = self.parts()
        return max(self.loading(), sum(stays.values()) + max(sum(parts.values()) for parts in phases.values()))

    def describe(self, free: float) -> str:
        """One line: each part in GB, and the sum beside what is free."""
        stays, phases = self.parts()
        largest = max(phases, key=lambda name: sum(phases[name].values()))
        parts = stays | {f"{name} of the {largest}": size for name, size in phases[largest].items()}
        shown = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items() if size >= 5e7)
        return f"memory: up to {self.most() / 1e9:.1f} of the {free / 1e9:.1f} GB free on {self.device} ({shown})"


def check_fits(plan: Plan, free: float, with_lora: Callable[[], ModelSize], eight_bit: float) -> None:
    """Print what a run will take, refuse what cannot fit, and warn of what may not.

    Args:
        plan: The run.
        free: Bytes.
        with_lora: Sizes the policy up with `--lora-rank 16`; called only where something does not fit.
        eight_bit: Bytes of the reward model in int8; 0 where that is no way out.

    Raises:
        InputError: It cannot fit; the message names the flags with which it would.
    """
    say(plan.describe(free))
    if plan.most() <= free:
        return
    found = ways_out(plan, with_lora() if plan.policy.trained == plan.policy.weights else None, free, eight_bit)
    way_out = f"what fits at full length: {', '.join(found)}" if found else "take a smaller --model-name or --max-new-tokens"
    if plan.least() > free:
        raise InputError(
            f"memory: the run needs {plan.least() / 1e9:.1f} GB on {plan.device} before the first token, and "
            f"{free / 1e9:.1f} GB are free; {way_out}"
        )
    print(
        f"warning: memory may run out: completions of full length need {plan.most() / 1e9:.1f} GB on {plan.device}, and "
        f"{free / 1e9:.1f} GB are free; {way_out}",
        flush=True,
    )


def ways_out(plan: Plan, with_lora: ModelSize | None, free: float, eight_bit: float) -> list[str]:
    """Flags that would make a plan fit at full length, with what it would then take; one by one, then each with LoRA."""
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
    fits = {flags: changed.most() for flags, changed in tries.items() if changed.most() <= free}
    shortest = min((flags.count("--") for flags in fits), default=0)
    return [f"{flags} ({size / 1e9:.1f} GB)" for flags, size in fits.items() if flags.count("--") == shortest]


def free_memory(device: torch.device) -> float:
    """Bytes that this process can still take on a device; on the CPU within the limit of its container."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return float(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    free = float(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):  # no such limit ("max")
        limit, used = (float((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        files = float(stat["active_file"]) + float(stat["inactive_file"])  # cached; given back when memory is wanted
        free = min(free, limit - used + files)
    return free


def bound_product_cache() -> None:
    """Let oneDNN remember 256 compiled products in place of 1,024; call it before the first.

    Each takes 0.6 MB, and training meets ever new shapes: a run on a CPU would grow by half a GB in its first hundred steps. A
    pass has fewer than a hundred shapes. ONEDNN_PRIMITIVE_CACHE_CAPACITY, where it is set, decides.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")


def keep_freed_memory() -> None:
    """Let glibc reuse large blocks instead of handing each back to the system; elsewhere, do nothing.

    By default every tensor of over 32 MB is mapped anew and its pages are zeroed and faulted in at their first touch. On a
    CPU that is a sixth of the update's time and most of the sampler's token choice (benchmarks/NOTES.md).
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, -1)  # never
    libc.mallopt(M_TOP_PAD, 64 * 2**20)
