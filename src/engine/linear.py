"""Linear layers with joined or packed weights, and output heads whose logits are not rounded to bfloat16."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from src.engine import kernels
from src.engine.native_library import call

Linear = Callable[[torch.Tensor], torch.Tensor]  # a layer (n, in) -> (n, out)


class PackedWeight:
    """A linear layer whose weight is laid out once for the matrix units (AMX) of x86 processors.

    Args:
        weight: (out, in) bfloat16. Both sizes are multiples of 32.
        bias: (out,), or None.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        self.columns, self.depth = weight.shape
        self.bias = map_bias(torch.Tensor.float, bias)
        self.packed = torch.empty_like(weight)
        call("pack_weight", weight.dtype, weight, self.packed, self.columns, self.depth)

    @staticmethod
    def supports(weight: torch.Tensor) -> bool:
        divisible = all(size % 32 == 0 for size in weight.shape)
        return weight.dtype == torch.bfloat16 and divisible and kernels.matrix_units()

    def __call__(self, x: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """Apply the layer, with sums in float32.

        A row's result is bit-identical whatever the other rows contain, which PyTorch's products do not
        guarantee.

        Args:
            x: (n, in) bfloat16.
            dtype: The result's dtype: float32, or bfloat16 for a rounded result.

        Returns:
            (n, out).
        """
        out = torch.empty(len(x), self.columns, dtype=dtype)
        wide, rounded = (out, None) if dtype == torch.float32 else (None, out)
        sizes = (len(x), self.columns, self.depth)
        call("multiply_packed", x.dtype, x, self.packed, self.bias, wide, rounded, *sizes)
        return out


def map_bias(
    change: Callable[[torch.Tensor], torch.Tensor], bias: torch.Tensor | None
) -> torch.Tensor | None:
    """Apply a function to a layer's bias, if it has one."""
    return None if bias is None else change(bias)


def cat_weights(*weights: torch.Tensor) -> torch.Tensor:
    """Concatenate weights (n, D) along their rows, without a copy if they are already adjacent in memory."""
    first, address = weights[0], weights[0].data_ptr()
    storage = first.untyped_storage().data_ptr()
    for weight in weights:
        if weight.data_ptr() != address or weight.untyped_storage().data_ptr() != storage:
            return torch.cat(weights)
        address += weight.nbytes
    return first.as_strided((sum(map(len, weights)), first.shape[1]), (first.shape[1], 1))


def cat_biases(*biases: torch.Tensor | None) -> torch.Tensor | None:
    """Concatenate the biases that exist; None if there are none."""
    present = [bias.detach() for bias in biases if bias is not None]
    return torch.cat(present) if present else None


def make_linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
    """A linear layer (n, in) -> (n, out).

    On a machine with matrix units, it computes exactly the same products as a decode step.
    """
    if PackedWeight.supports(weight):
        return PackedWeight(weight, bias)
    return lambda x: F.linear(x, weight, bias)


def make_head(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    """The output head as a function from hidden states (n, D) to logits (n, V) float32, without a gradient.

    PyTorch rounds the result of a bfloat16 product to bfloat16. That changes logits near 20 by up to 0.06 and
    causes half of the error in the log-probs. On a CPU without matrix units, both factors are therefore
    converted to float32, and oneDNN is told to multiply them as bfloat16, which loses nothing because their
    values still fit that format, and to return float32.

    Args:
        weight: (V, D).
        bias: (V,), or None.
    """
    weight, bias = weight.detach(), map_bias(torch.Tensor.detach, bias)
    if weight.device.type == "cuda" and weight.dtype == torch.bfloat16:

        def on_gpu(hidden: torch.Tensor) -> torch.Tensor:
            logits = torch.mm(hidden, weight.T, out_dtype=torch.float32)
            return logits if bias is None else logits + bias

        return on_gpu
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return lambda hidden: F.linear(hidden, weight, bias).float()
    if PackedWeight.supports(weight):
        packed = PackedWeight(weight, bias)
        return lambda hidden: packed(hidden, torch.float32)
    wide, wide_bias = weight.float(), map_bias(torch.Tensor.float, bias)
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # torch swaps this module for an object

    def head(hidden: torch.Tensor) -> torch.Tensor:
        before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
        try:
            return F.linear(hidden.float(), wide, wide_bias)
        finally:
            matmul.fp32_precision = before

    return head
