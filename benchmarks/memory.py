"""The tables of GPU memory in docs/memory.md: python benchmarks/memory.py

src/engine/memory_plan.py computes them from the models' configurations, which are written out here. Nothing
is downloaded, and no GPU is needed.
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import tyro
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config

sys.path.insert(0, str(Path(__file__).parent.parent))

from src import models
from src.engine.memory_plan import Plan
from src.engine.model_size import ModelSize, measure
from src.reward_model import BATCH_TOKENS, reward_model_bytes

TINYLLAMA = LlamaConfig(
    vocab_size=32_000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
    num_key_value_heads=4, max_position_embeddings=2048, architectures=["LlamaForCausalLM"],
)  # fmt: skip
ACEMATH_RM = Qwen2Config(
    vocab_size=152_064, hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28,
    num_attention_heads=28, num_key_value_heads=4, architectures=["Qwen2ForSequenceClassification"],
)  # fmt: skip
PROMPT, COMPLETION = 42, 470  # tokens; their sum is the default --max-length


def save_config(config: PreTrainedConfig, folder: Path) -> str:
    """Make a model folder without weights, and return its path."""
    config.save_pretrained(folder)
    return str(folder)


def policy_size(folder: str, lora_rank: int, dtype: torch.dtype = torch.bfloat16) -> ModelSize:
    """The sizes of a policy."""
    skeleton = models.skeleton(folder, AutoModelForCausalLM, dtype, folder)
    if lora_rank:
        models.add_lora(skeleton, lora_rank)
    return measure(skeleton, "cuda")


def plans() -> dict[str, tuple[Plan, tuple[str, ...]]]:
    """Plans of TinyLlama with the default settings, and where each one's reward model may be."""
    with tempfile.TemporaryDirectory() as temporary:
        policy = save_config(TINYLLAMA, Path(temporary, "policy"))
        reward_model = save_config(ACEMATH_RM, Path(temporary, "reward_model"))
        full, lora = policy_size(policy, 0), policy_size(policy, 16)
        in_float32 = policy_size(policy, 16, torch.float32)
        in_bfloat16, in_int8 = (
            reward_model_bytes(reward_model, torch.bfloat16, eight_bit) for eight_bit in (False, True)
        )
    alone = Plan(full, "cuda", 64, 8, 8, PROMPT, COMPLETION, reference=True, optimizer_steps=8, passes=1)
    plan = with_reward_model(alone, in_bfloat16)
    with_lora = replace(plan, policy=lora, reference=False)
    anywhere, fixed = ("stays", "visits", "streams"), ("stays",)
    return {
        "all weights trained": (plan, anywhere),
        "`--kl-weight 0`": (replace(plan, reference=False), anywhere),
        "`--reward-model-8bit`": (with_reward_model(plan, in_int8), fixed),
        "`--reward-model-name none`": (alone, anywhere),
        "`--lora-rank 16`": (with_lora, anywhere),
        "`--lora-rank 16 --reward-model-8bit`": (with_reward_model(with_lora, in_int8), fixed),
        "`--lora-rank 16 --reward-model-name none --dtype float32`": (
            replace(alone, policy=in_float32, reference=False),
            anywhere,
        ),
    }


def with_reward_model(plan: Plan, size: tuple[float, float, float]) -> Plan:
    """A plan with a reward model, given what `reward_model_bytes` says about it."""
    passes = -(-plan.completions * (PROMPT + COMPLETION) // BATCH_TOKENS)
    weights, activations, piece = size
    return replace(
        plan,
        reward_weights=weights,
        reward_activations=activations,
        reward_piece=piece,
        reward_passes=passes,
    )


def tables() -> str:
    """Both tables in Markdown: what a run needs on different cards, and what is where on one of 24 GB."""
    lines = [
        "| TinyLlama with AceMath-7B-RM | all on the GPU | 24 GB card | 18 GB | 16 GB | least |",
        "|---" * 6 + "|",
    ]
    for name, (plan, ways) in plans().items():
        cells = [f"{plan.max_bytes() / 1e9:.1f}"]
        for free in (24e9, 18e9, 16e9, 0.0):
            fitted = plan.fitted(free, float("inf"), ways)
            fits = not free or fitted.max_bytes() <= free
            cost = f" (+{fitted.cost():.1f} s)" if fitted.cost() else ""
            cells.append(f"{fitted.max_bytes() / 1e9:.1f}{cost}" if fits else "no")
        lines.append("| " + " | ".join([name, *cells]) + " |")
    plan, ways = plans()["all weights trained"]
    phases = plan.fitted(24e9, float("inf"), ways).table()
    parts = dict.fromkeys(part for phase in phases.values() for part in phase)
    lines += ["", "| GB on a 24 GB card | " + " | ".join(phases) + " |", "|---" * (len(phases) + 1) + "|"]
    for part in parts:
        row = [f"{phase[part] / 1e9:.1f}" if part in phase else "" for phase in phases.values()]
        lines.append("| " + " | ".join([part, *row]) + " |")
    total = [f"{sum(phase.values()) / 1e9:.1f}" for phase in phases.values()]
    lines.append("| " + " | ".join(["**total**", *total]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print the tables."""
    print(tables())


if __name__ == "__main__":
    tyro.cli(main)
