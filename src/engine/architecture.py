"""What kind of model it is: which of the fast paths it can take, and whether its sequences can be packed."""

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

# Model types that consist only of RMSNorm, rotary positions, grouped heads and SwiGLU.
LLAMA_LIKE = ("llama", "mistral", "qwen2")
# Rotary embeddings whose angles depend only on the position.
FIXED_ROTARY = ("default", "linear", "llama3", "yarn")
PROJECTIONS = ("_proj", "lm_head")  # how the names of linear layers end


def text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """A model's configuration or, if the model is multimodal, that of its language model."""
    return model.config.get_text_config()


def backbone(model: PreTrainedModel) -> nn.Module:
    """What computes a model's last hidden states, to which its output head is applied."""
    return model.base_model if model.base_model is not model else getattr(model, "model", model)


def is_llama_like(model: PreTrainedModel) -> bool:
    """Whether a model consists only of what `LLAMA_LIKE` lists, and attends to all earlier tokens."""
    config = text_config(model)
    if config.model_type not in LLAMA_LIKE or config.hidden_act != "silu" or not can_pack(model):
        return False
    if config.rope_parameters["rope_type"] not in FIXED_ROTARY:
        return False
    may_have_bias = ("q_proj", "k_proj", "v_proj", "lm_head")
    projections = {name: m for name, m in model.named_modules() if name.endswith(PROJECTIONS)}
    return all(
        getattr(m, "bias", None) is None or name.endswith(may_have_bias) for name, m in projections.items()
    )


def has_plain_layers(model: PreTrainedModel) -> bool:
    """Whether all projections are plain linear layers, without an adapter."""
    return all(type(m) is nn.Linear for name, m in model.named_modules() if name.endswith(PROJECTIONS))


def head_dim(config: PreTrainedConfig) -> int:
    """The size of a head, which a configuration may leave out."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def can_pack(model: PreTrainedModel) -> bool:
    """Whether every layer attends to all earlier tokens. A sliding window would ignore the packed mask."""
    if getattr(model, "never_packed", False):
        return False
    config = text_config(model)
    layers = getattr(config, "layer_types", None)
    # Mistral's code looks only at the sliding window and ignores the layer types.
    if layers and config.model_type != "mistral":
        return all(kind == "full_attention" for kind in layers)
    return getattr(config, "sliding_window", None) is None


def forbid_packing(model: PreTrainedModel) -> None:
    """Give each completion of a model, or of a copy of it, a row of its own, because packing is wrong."""
    vars(model)["never_packed"] = True


def join_weights(model: PreTrainedModel) -> None:
    """Make weights with the same input adjacent in memory, so that `cat_weights` need not copy them."""
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for parts in ((attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)):
            joined = torch.cat([part.weight.detach() for part in parts])
            for part, weight in zip(parts, joined.split([len(part.weight) for part in parts]), strict=True):
                part.weight.data = weight
