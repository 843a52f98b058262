"""Float32 weights for the optimizer of a model that may compute in bfloat16, and their optimizer step."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from transformers import PreTrainedModel

from src.engine import architecture
from src.engine.offload import Offloaded


class MasterWeights:
    """Float32 weights for the optimizer of a model that computes in `dtype`.

    For most bfloat16 weights, an update of 5e-6 is less than half a rounding step, so adding it would change
    nothing. The optimizer therefore updates these float32 weights, and the model receives rounded copies. The
    gradients of several micro-batches are summed in float32 too: as soon as a backward pass has computed a
    weight's gradient, it is added to that of the float32 weight and freed. If `dtype` is float32, the model's
    own weights are used and nothing is copied. Weights that require no gradient are never copied.

    Args:
        model: A float32 model, which is converted to `dtype`.
        moves: The parts that are in host memory except inside `on_device`, as in `memory_plan.Plan`.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype, moves: Mapping[str, str] | None = None):
        assert all(p.dtype == torch.float32 for p in model.parameters())
        self.separate = dtype != torch.float32
        trained = {name: w for name, w in model.named_parameters() if w.requires_grad}
        self.names = list(trained)
        self.weights: list[torch.Tensor] = list(trained.values())
        self.parameters = self.weights
        self.moves = moves or {}
        self.optimizer: torch.optim.Optimizer | None = None  # whose moments are offloaded
        self.visitors: list[Offloaded] = []  # on the device only inside `on_device`
        self.streams: list[Offloaded] = []  # each parameter's moments, on the device only in its own step
        if self.separate:
            self.parameters = [torch.nn.Parameter(w.detach().clone()) for w in self.weights]
            self.zero_grad()
            for w in model.parameters():  # not model.to(dtype), which would round the rotary frequencies too
                w.data = w.data.to(dtype)
            model.config.dtype = dtype
            if architecture.is_llama_like(model) and architecture.has_plain_layers(model):
                architecture.join_weights(model)
            for master, weight in zip(self.parameters, self.weights, strict=True):
                weight.register_post_accumulate_grad_hook(partial(_take_gradient, master))
            if "trained weights" in self.moves:
                self.visitors.append(Offloaded(lambda: self.parameters, self.weights[0].device, change=True))

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

    @contextmanager
    def on_device(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Keep everything that an update needs on the device inside the `with` block.

        Args:
            optimizer: The optimizer of `parameters`. From the first call on, its moments are offloaded.
        """
        if self.optimizer is not optimizer:
            self._offload_moments(optimizer)
        with ExitStack() as stack:
            for visitor in self.visitors:
                stack.enter_context(visitor.on_device())
            yield

    def _offload_moments(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, device, way = optimizer, self.weights[0].device, self.moves.get("Adam")
        if way == "visits":
            moments = partial(_moments, optimizer, self.parameters)
            self.visitors.append(Offloaded(moments, device, change=True))
        elif way == "streams":
            each = [partial(_moments, optimizer, [p]) for p in self.parameters]
            self.streams = [Offloaded(moments, device, change=True) for moments in each]

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Take one optimizer step, and copy the new weights into the model.

        If the moments are streamed, each weight takes its step when its own moments are on the device, and
        its gradient is freed. The result is the same, because AdamW treats every weight by itself.
        """
        if self.streams:
            gradients = [p.grad for p in self.parameters]
            for parameter in self.parameters:
                parameter.grad = None
            for i, (parameter, moments) in enumerate(zip(self.parameters, self.streams, strict=True)):
                parameter.grad, gradients[i] = gradients[i], None
                with moments.on_device():
                    optimizer.step()
                parameter.grad = None
        else:
            optimizer.step()
        self.write_back()

    def load_moments(
        self, optimizer: torch.optim.Optimizer, moments: Mapping[str, Mapping[str, torch.Tensor]]
    ) -> None:
        """Set what the optimizer keeps for each weight. Call this inside `on_device`.

        Args:
            moments: Tensors by the name of their part (exp_avg, ...) and that of their weight; copied.
        """
        for name, parameter in zip(self.names, self.parameters, strict=True):
            device = "cpu" if self.streams else parameter.device
            parts = {part: values[name] for part, values in moments.items() if name in values}
            if parts:
                copies = {part: value.to(device, copy=True) for part, value in parts.items()}
                optimizer.state[parameter] = copies
        for stream in self.streams:
            stream.park()

    @torch.no_grad()
    def write_back(self) -> None:
        """Copy the master weights, rounded, into the model."""
        if self.separate:
            torch._foreach_copy_(self.weights, self.parameters)

    def restore(self, model: PreTrainedModel) -> None:
        """Make the model float32 on the CPU, with the master weights, so LoRA is merged without rounding."""
        for p in model.parameters():
            p.data = p.data.to("cpu", torch.float32)
        for master, weight in zip(self.parameters, self.weights, strict=True):
            weight.data = master.data.cpu()
        model.config.dtype = torch.float32


def _take_gradient(master: torch.Tensor, weight: torch.Tensor) -> None:
    """Add a weight's gradient to that of its master weight, and free it."""
    assert weight.grad is not None
    if master.grad is None:
        master.grad = weight.grad.float()
    else:
        master.grad.add_(weight.grad)
    weight.grad = None


def _moments(optimizer: torch.optim.Optimizer, parameters: list[torch.Tensor]) -> list[torch.Tensor]:
    """What an optimizer keeps for some parameters; nothing before its first step."""
    state = optimizer.state
    return [value for p in parameters if p in state for value in state[p].values()]
