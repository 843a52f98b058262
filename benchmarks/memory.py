"""The table of GPU memory in docs/memory.md: python benchmarks/memory.py

src/engine/memory.py computes it from the models' configurations, which are written out here. Nothing is
downloaded, and no GPU is needed.
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
from src.engine.memory import ModelSize, Plan, measure
from src.placement import reward_model_bytes

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


def policy_size(folder: str, lora_rank: int) -> ModelSize:
    """The sizes of a policy in bfloat16."""
    skeleton = models.skeleton(folder, AutoModelForCausalLM, torch.bfloat16, folder)
    if lora_rank:
        models.add_lora(skeleton, lora_rank)
    return measure(skeleton, "cuda")


def with_reward_model(plan: Plan, size: tuple[float, float]) -> Plan:
    """A plan with a reward model, given the bytes of its weights and of its activations."""
    return replace(plan, reward_weights=size[0], reward_activations=size[1])


def table() -> str:
    """The table in Markdown: GB before the first token, and GB at full length if that is more."""
    with tempfile.TemporaryDirectory() as temporary:
        policy = save_config(TINYLLAMA, Path(temporary, "policy"))
        reward_model = save_config(ACEMATH_RM, Path(temporary, "reward_model"))
        full, lora = policy_size(policy, 0), policy_size(policy, 16)
        in_bfloat16, in_int8 = (
            reward_model_bytes(reward_model, torch.bfloat16, eight_bit) for eight_bit in (False, True)
        )
    plan = Plan(full, "cuda", 64, 8, 8, PROMPT, COMPLETION, reference=True)
    with_lora = replace(plan, policy=lora, reference=False)
    rows = {
        "all weights trained": plan,
        "`--kl-weight 0`": replace(plan, reference=False),
        "`--lora-rank 16`": with_lora,
        "`--lora-rank 16 --micro-batch-size 1`": replace(with_lora, micro_batch_size=1),
    }
    lines = [
        "| TinyLlama, 1.1 billion weights | no reward model | AceMath-7B-RM | in int8 | offloaded |",
        "|---" * 5 + "|",
    ]
    for name, row in rows.items():
        cells = (
            row,
            with_reward_model(row, in_bfloat16),
            with_reward_model(row, in_int8),
            replace(with_reward_model(row, in_bfloat16), reward_placement="offload"),
        )
        ranges = [[f"{size / 1e9:.1f}" for size in (cell.min_bytes(), cell.max_bytes())] for cell in cells]
        lines.append("| " + " | ".join([name, *(" to ".join(dict.fromkeys(ends)) for ends in ranges)]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    print(table())


if __name__ == "__main__":
    tyro.cli(main)
