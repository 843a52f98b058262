"""Float32 weights for the optimizer of a model that may compute in bfloat16."""

import torch
from transformers import PreTrainedModel

from src.engine import architecture


class MasterWeights:
    """Float32 weights for the optimizer of a model that computes in `dtype`.

    For most bfloat16 weights, an update of 5e-6 is less than half a rounding step, so adding it would change
    nothing. The optimizer therefore updates these float32 weights, and the model receives rounded copies. The
    gradients of several micro-batches are summed in float32 too. If `dtype` is float32, the model's own
    weights are used and nothing is copied. Weights that require no gradient are never copied.

    Args:
        model: A float32 model, which is converted to `dtype`.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype):
        assert all(p.dtype == torch.float32 for p in model.parameters())
        self.separate = dtype != torch.float32
        trained = {name: w for name, w in model.named_parameters() if w.requires_grad}
        self.names = list(trained)
        self.weights: list[torch.Tensor] = list(trained.values())
        self.parameters = self.weights
        if self.separate:
            self.parameters = [torch.nn.Parameter(w.detach().clone()) for w in self.weights]
            self.zero_grad()
            for w in model.parameters():  # not model.to(dtype), which would round the rotary frequencies too
                w.data = w.data.to(dtype)
            model.config.dtype = dtype
            if architecture.is_llama_like(model) and architecture.has_plain_layers(model):
                architecture.join_weights(model)

    def take_gradients(self) -> None:
        """Add the model's gradients to those of the master weights, and free the model's.

        Call this after each backward pass.
        """
        if not self.separate:
            return
        sums, gradients = [], []
        for master, weight in zip(self.parameters, self.weights, strict=True):
            if weight.grad is not None:
                if master.grad is None:
                    master.grad = weight.grad.float()
                else:
                    sums.append(master.grad)
                    gradients.append(weight.grad)
                weight.grad = None
        if sums:
            torch._foreach_add_(sums, gradients)

    def zero_grad(self) -> None:
        """Reset the master weights' gradients. Call this after each optimizer step.

        On a CPU, the memory of the gradients is kept. Allocating it again in the middle of an update would
        fragment the memory that freed activations leave behind, and the heap would grow (by 0.2 GB for the
        bundled model).
        """
        if self.separate:
            for w in self.weights:  # a backward pass that ran out of memory leaves gradients in some
                w.grad = None
        for p in self.parameters:
            if not self.separate or p.device.type != "cpu":
                p.grad = None
            elif p.grad is None:
                p.grad = torch.zeros_like(p)
            else:
                p.grad.zero_()

    @torch.no_grad()
    def write_back(self) -> None:
        """Copy the master weights, rounded, into the model. Call this after each optimizer step."""
        if self.separate:
            torch._foreach_copy_(self.weights, self.parameters)

    def restore(self, model: PreTrainedModel) -> None:
        """Make the model float32 on the CPU, with the master weights, so LoRA is merged without rounding."""
        for p in model.parameters():
            p.data = p.data.to("cpu", torch.float32)
        for master, weight in zip(self.parameters, self.weights, strict=True):
            weight.data = master.data.cpu()
        model.config.dtype = torch.float32
