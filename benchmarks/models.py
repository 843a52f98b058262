"""The table in docs/models.md, which architectures can be trained and how: python benchmarks/models.py

Each is tried with a tiny random model of its own class, in float32 on a CPU. Nothing is downloaded.
"""

import contextlib
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
import tyro
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parent.parent))

from src import models
from src.engine import architecture, llama, self_check
from src.engine.model_size import measure
from src.errors import InputError

VOCABULARY = 300
BASE = dict(
    vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
TEXT = BASE | dict(head_dim=16)
LOCAL_AND_GLOBAL = dict(sliding_window=64, layer_types=["sliding_attention", "full_attention"])
MIXTURE = dict(num_experts_per_tok=2, moe_intermediate_size=32)
LINEAR = dict(
    linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
    layer_types=["linear_attention", "full_attention"],
)  # fmt: skip
MAMBA = dict(mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16, mamba_chunk_size=8)
VISION = dict(
    hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28,
    patch_size=14,
)  # fmt: skip
LONGROPE = dict(
    rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 8, long_factor=[4.0] * 8,
    original_max_position_embeddings=64,
)  # fmt: skip
LATENT = dict(
    q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16, n_group=1,
    topk_group=1, n_routed_experts=4, first_k_dense_replace=1, num_key_value_heads=4,
)  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """A family of models, with the settings of a tiny one."""

    name: str
    year: int
    model_type: str
    settings: dict[str, Any]


ARCHITECTURES = [
    Architecture("Llama (TinyLlama, SmolLM2, Llama 3)", 2023, "llama", BASE),
    Architecture("Mistral", 2023, "mistral", BASE | dict(sliding_window=None)),
    Architecture("Mistral with a sliding window", 2023, "mistral", BASE | dict(sliding_window=64)),
    Architecture("Qwen 2 and 2.5", 2024, "qwen2", BASE),
    Architecture("Phi-3 and Phi-4 mini", 2024, "phi3", BASE | dict(max_position_embeddings=512)),
    Architecture(
        "Phi-3 beyond its LongRoPE's original length", 2024, "phi3",
        BASE | dict(max_position_embeddings=512, rope_parameters=LONGROPE,
                    original_max_position_embeddings=64),
    ),
    Architecture("Gemma 2", 2024, "gemma2", TEXT | dict(sliding_window=64)),
    Architecture("Command R7B (Cohere 2)", 2024, "cohere2", BASE | dict(sliding_window=64)),
    Architecture("DeepSeek V3", 2024, "deepseek_v3", BASE | LATENT | MIXTURE),
    Architecture(
        "Mamba 2", 2024, "mamba2",
        dict(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_heads=8, head_dim=16,
             state_size=16, n_groups=1, chunk_size=8),
    ),
    Architecture("Qwen 3", 2025, "qwen3", TEXT),
    Architecture("Qwen 3 MoE", 2025, "qwen3_moe", TEXT | MIXTURE | dict(num_experts=4)),
    Architecture("Qwen3-Next", 2025, "qwen3_next",
                 TEXT | LINEAR | MIXTURE | dict(num_experts=4, shared_expert_intermediate_size=32)),
    Architecture("Gemma 3, text", 2025, "gemma3_text", TEXT | LOCAL_AND_GLOBAL),
    Architecture("Gemma 3, multimodal", 2025, "gemma3",
                 dict(text_config=TEXT | LOCAL_AND_GLOBAL, vision_config=VISION)),
    Architecture("SmolLM3", 2025, "smollm3", BASE),
    Architecture("OLMo 2", 2025, "olmo2", BASE),
    Architecture("OLMo 3", 2025, "olmo3", BASE | dict(sliding_window=64)),
    Architecture("gpt-oss", 2025, "gpt_oss", TEXT | dict(num_local_experts=4, num_experts_per_tok=2,
                                                         sliding_window=64)),
    Architecture("Llama 4, text", 2025, "llama4_text",
                 TEXT | dict(attention_chunk_size=64, num_local_experts=2, num_experts_per_tok=1,
                             intermediate_size_mlp=128)),
    Architecture("LFM2", 2025, "lfm2", BASE | dict(layer_types=["conv", "full_attention"])),
    Architecture("Falcon-H1", 2025, "falcon_h1", BASE | MAMBA | dict(mamba_d_ssm=128)),
    Architecture("Granite 4 hybrid", 2025, "granitemoehybrid",
                 BASE | MAMBA | dict(layer_types=["mamba", "attention"], num_local_experts=2,
                                     num_experts_per_tok=1, shared_intermediate_size=64)),
    Architecture("Ministral", 2025, "ministral", TEXT | LOCAL_AND_GLOBAL),
    Architecture("GLM-4", 2025, "glm4", TEXT),
    Architecture("EXAONE 4", 2025, "exaone4", BASE | LOCAL_AND_GLOBAL),
    Architecture("ERNIE 4.5", 2025, "ernie4_5", TEXT),
    Architecture("Qwen3.5, text", 2026, "qwen3_5_text", TEXT | LINEAR),
    Architecture("GPT-2", 2019, "gpt2", dict(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4)),
    Architecture("GPT-Neo", 2021, "gpt_neo",
                 dict(vocab_size=VOCABULARY, hidden_size=64, num_layers=2, num_heads=4, window_size=64,
                      attention_types=[[["global", "local"], 1]], max_position_embeddings=512)),
    Architecture("BLOOM", 2022, "bloom", dict(vocab_size=VOCABULARY, hidden_size=64, n_layer=2, n_head=4)),
    Architecture("MPT", 2023, "mpt",
                 dict(vocab_size=VOCABULARY, d_model=64, n_heads=4, n_layers=2, max_seq_len=512)),
    Architecture("Falcon with ALiBi", 2023, "falcon",
                 dict(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                      alibi=True, new_decoder_architecture=False)),
    Architecture("RWKV 4", 2023, "rwkv", dict(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2)),
]  # fmt: skip
ARGS = SimpleNamespace(
    model_name="x", temperature=0.8, max_length=160, max_new_tokens=None, rollouts_per_step=2, group_size=4
)
PROMPTS = [tuple(range(5, 30)), tuple(range(40, 60))]


def build(architecture: Architecture) -> PreTrainedModel:
    """A random model, whose distributions are far from uniform."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture.model_type, **architecture.settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight *= 5
    return model


def try_out(tried: Architecture) -> tuple[str, str, float | None]:
    """How an architecture is trained, or why not, and the largest difference from its own forward pass."""
    model = build(tried)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            measure(model, "cpu")
            models.check_head(model)
            self_check.check_model(model, PROMPTS, ARGS)
    except InputError as error:
        return "refused", str(error).removeprefix("--model-name x: "), None
    gaps = self_check.compare(model, PROMPTS, ARGS)
    how = "one completion per row"
    if llama.is_supported(model):
        how = "compiled kernels"
    elif architecture.can_pack(model):
        how = "packed rows"
    return how, "", max(gaps.sampler + gaps.trainer)


def table() -> str:
    """The table in Markdown."""
    lines = ["| architecture | year | on a CPU | largest difference |", "|---" * 4 + "|"]
    for tried in ARCHITECTURES:
        how, why, gap = try_out(tried)
        shown = f"{gap:.0e} nats" if gap is not None else ""
        lines.append(f"| {tried.name} | {tried.year} | {how}{f': {why}' if why else ''} | {shown} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    transformers.logging.set_verbosity_error()
    print(table())


if __name__ == "__main__":
    tyro.cli(main)
