"""Float32 weights for the optimizer, where the model itself computes in bfloat16."""

import torch
from transformers import PreTrainedModel

from src import llama


class MasterWeights:
    """Float32 weights for the optimizer beside a model that computes in `dtype`.

    An update of 5e-6 is below half a rounding step of most bfloat16 weights: added to them it is lost. It is added to
    these instead, and the model gets them rounded. Gradients of several micro-batches are summed in float32 too.
    Where `dtype` is float32 the model's own weights serve and nothing is copied; nor is it for weights that take no gradient.

    Args:
        model: In float32; becomes `dtype`.
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
            self.release_gradients()
            for w in model.parameters():  # not model.to(dtype), which would round the rotary frequencies too
                w.data = w.data.to(dtype)
            model.config.dtype = dtype
            if llama.fits(model):
                llama.join_weights(model)

    def accumulate_gradients(self) -> None:
        """Add the model's gradients to the masters' and free them; call it after each backward."""
        if not self.separate:
            return
        for master, weight in zip(self.parameters, self.weights, strict=True):
            if weight.grad is not None:
                if master.grad is None:
                    master.grad = weight.grad.float()
                else:
                    master.grad += weight.grad
                weight.grad = None

    def release_gradients(self) -> None:
        """Begin at no gradient; call it after each optimizer step.

        On a CPU their memory stays theirs: taken anew in the midst of an update, it cuts up what activations come back to,
        and the heap grows: by 0.2 GB for the embedded model.
        """
        for p in self.parameters:
            if not self.separate or p.device.type != "cpu":
                p.grad = None
            elif p.grad is None:
                p.grad = torch.zeros_like(p)
            else:
                p.grad.zero_()

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the masters into the model; call it after each optimizer step."""
        if self.separate:
            torch._foreach_copy_(self.weights, self.parameters)

    def restore(self, model: PreTrainedModel) -> None:
        """Make the model float32 again, on the CPU, with the masters as its trained weights: for merging without rounding."""
        for p in model.parameters():
            p.data = p.data.to("cpu", torch.float32)
        for master, weight in zip(self.parameters, self.weights, strict=True):
            weight.data = master.data.cpu()
        model.config.dtype = torch.float32

    @torch.no_grad()
    def sample_values(self, per_tensor: int = 2048) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Evenly spaced (values, gradients) of every parameter that has a gradient, to see how many of them a step moves."""
        picked = []
        for p in self.parameters:
            if p.grad is not None:
                every = max(1, p.numel() // per_tensor)
                picked.append((p.flatten()[::every].clone(), p.grad.flatten()[::every].clone()))
        return picked
