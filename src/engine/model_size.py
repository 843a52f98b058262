"""The sizes of a model that decide how much memory training it takes, from its configuration only."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from src.engine import architecture, cuda_llama, llama


@dataclass(frozen=True)
class ModelSize:
    """The sizes of a model that the memory plan needs. Bytes refer to the dtype in which it was measured."""

    weights: int
    trained: int  # how many of the weights are trained
    largest: int  # the size of the largest trained weight
    itemsize: int  # bytes per weight
    activation: float  # bytes that a forward pass keeps for the backward pass, per token
    # The same with gradient checkpointing: the inputs of all layers. Infinite if the layers don't support it.
    checkpointed: float
    recomputed: float  # bytes of one layer's activations, which checkpointing computes again, per token
    backward: float  # bytes that the backward pass of one layer adds, per token
    forward: float  # bytes in use during a forward pass that keeps nothing, per token
    cache: float  # bytes of keys and values, per token
    hidden: int
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
    config = architecture.text_config(skeleton)
    layers, itemsize = config.num_hidden_layers, skeleton.dtype.itemsize
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
    on_gpu = device == "cuda" and skeleton.dtype == torch.bfloat16 and architecture.is_llama_like(skeleton)
    trained = [w.numel() for w in skeleton.parameters() if w.requires_grad]
    if on_gpu:
        kept, inputs, backward, forward = cuda_llama.activation_bytes(skeleton)
    else:
        kept, inputs = kept_by_transformers(skeleton), 4.0 * config.hidden_size * layers
        backward, forward = 0.5 * kept / layers, 1.5 * kept / layers
    recomputes = any(isinstance(module, GradientCheckpointingLayer) for module in skeleton.modules())
    return ModelSize(
        weights=skeleton.num_parameters(),
        trained=sum(trained),
        largest=max(trained, default=0),
        itemsize=itemsize,
        activation=kept,
        checkpointed=inputs if recomputes else float("inf"),
        recomputed=kept / layers,
        backward=backward,
        forward=forward,
        cache=2.0 * layers * heads * architecture.head_dim(config) * itemsize if heads else 0.0,
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        flat=on_gpu or (device == "cpu" and llama.has_kernels_for(skeleton)),
    )


def kept_by_transformers(skeleton: PreTrainedModel) -> float:
    """Bytes per token that transformers' own forward pass keeps for the backward pass."""
    config, tokens = architecture.text_config(skeleton), 16
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
            architecture.backbone(skeleton)(input_ids=ids, attention_mask=mask, use_cache=False)
    except Exception:  # OPT and MoE models read values, which meta tensors lack, but they can be trained
        # arXiv:2205.05198, equation 2
        saved = {0: tokens * 34 * config.hidden_size * config.num_hidden_layers * skeleton.dtype.itemsize}
    return sum(saved.values()) / tokens
