"""The README's table of GPU memory: python benchmarks/memory.py

Computed by src/memory.py from the models' configurations, which are written out here; nothing is downloaded and no GPU is asked.
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
from src.memory import ModelSize, Plan, measure
from src.reward_model import reward_model_bytes

TINYLLAMA = LlamaConfig(
    vocab_size=32_000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
    num_key_value_heads=4, max_position_embeddings=2048, architectures=["LlamaForCausalLM"],
)  # fmt: skip
ACEMATH_RM = Qwen2Config(
    vocab_size=152_064, hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28, num_attention_heads=28,
    num_key_value_heads=4, architectures=["Qwen2ForSequenceClassification"],
)  # fmt: skip
PROMPT, COMPLETION = 42, 470  # tokens; together --max-length


def saved(config: PreTrainedConfig, folder: Path) -> str:
    """A model folder without weights."""
    config.save_pretrained(folder)
    return str(folder)


def policy_size(folder: str, lora_rank: int) -> ModelSize:
    """Of the policy in bfloat16."""
    skeleton = models.skeleton(folder, AutoModelForCausalLM, torch.bfloat16, folder)
    if lora_rank:
        models.add_lora(skeleton, lora_rank)
    return measure(skeleton)


def table() -> str:
    """The table in Markdown: GB before the first token, and at full length where that is more."""
    with tempfile.TemporaryDirectory() as temporary:
        policy, reward_model = saved(TINYLLAMA, Path(temporary, "policy")), saved(ACEMATH_RM, Path(temporary, "reward_model"))
        whole, lora = policy_size(policy, 0), policy_size(policy, 16)
        reward, in_int8 = (reward_model_bytes(reward_model, torch.bfloat16, eight_bit) for eight_bit in (False, True))
    plan = Plan(whole, "cuda", 64, 8, 8, PROMPT, COMPLETION, reference=True)
    rows = {
        "all weights trained": plan,
        "`--kl-weight 0`": replace(plan, reference=False),
        "`--lora-rank 16`": replace(plan, policy=lora, reference=False),
        "`--lora-rank 16 --micro-batch-size 1`": replace(plan, policy=lora, reference=False, micro_batch_size=1),
    }
    lines = ["| TinyLlama, 1.1 billion weights | no reward model | AceMath-7B-RM | in int8 | offloaded |", "|---" * 5 + "|"]
    for name, row in rows.items():
        cells = (
            row,
            replace(row, reward_weights=reward),
            replace(row, reward_weights=in_int8),
            replace(row, reward_weights=reward, reward_placement="offload"),
        )
        ends = [[f"{size / 1e9:.1f}" for size in (cell.least(), cell.most())] for cell in cells]
        lines.append("| " + " | ".join([name, *(" to ".join(dict.fromkeys(pair)) for pair in ends)]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print it."""
    print(table())


if __name__ == "__main__":
    tyro.cli(main)
