"""Linear layers with joined or packed weights, and output heads whose logits are not rounded to bfloat16."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from src.engine import kernels
from src.engine.native_library import call

Linear = Callable[[torch.Tensor], torch.Tensor]  # a layer (n, in) -> (n, out)


class PackedWeight:
    """A linear layer whose weight is laid out once in the order in which a product reads it.

    In bfloat16, it needs an x86 processor with matrix units (AMX) or with vector units that multiply this
    format (AVX512_BF16); in float32, any processor will do. PyTorch lays out a weight again in every product,
    which is slow for few rows: with AVX2, 4 rows take twice as long as here, and 64 rows take 1.2 times as
    long (benchmarks/NOTES.md).

    Args:
        weight: (out, in), and `supports(weight)` is true.
        bias: (out,), or None.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        self.columns, self.depth = weight.shape
        self.bias = map_bias(torch.Tensor.float, bias)
        self.packed = torch.empty(weight.shape, dtype=weight.dtype)
        transposed = not weight.is_contiguous()
        stored = weight.T if transposed else weight
        sizes = (self.columns, self.depth)
        call("pack_weight", weight.dtype, stored, self.packed, *sizes, int(transposed))

    @staticmethod
    def supports(weight: torch.Tensor) -> bool:
        """Whether a weight (out, in) can be packed: its dtype, sizes, and layout fit the kernels."""
        if weight.device.type != "cpu" or not kernels.can_multiply_packed(weight.dtype):
            return False
        if len(weight) % 32:
            return False
        if weight.dtype == torch.bfloat16:  # oneDNN multiplies many rows by a transposed weight as fast
            return weight.shape[1] % 32 == 0 and weight.is_contiguous()
        return weight.is_contiguous() or weight.T.is_contiguous()

    def __call__(self, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Apply the layer, with sums in float32.

        A row's result is bit-identical whatever the other rows contain, which PyTorch's products do not
        guarantee.

        Args:
            x: (n, in), in the weight's dtype.
            dtype: The result's dtype: that of x, or float32 for a result that is not rounded.

        Returns:
            (n, out).
        """
        out = torch.empty(len(x), self.columns, dtype=dtype or x.dtype)
        targets = (out, None) if out.dtype == torch.float32 else (None, out)
        sizes = (len(x), self.columns, self.depth)
        call("multiply_packed", x.dtype, x, self.packed, self.bias, *targets, *sizes)
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

    If its weight can be packed, it computes exactly the same products as a decode step.
    """
    if PackedWeight.supports(weight):
        return PackedWeight(weight, bias)
    return lambda x: F.linear(x, weight, bias)


def make_head(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    """The output head as a function from hidden states (n, D) to logits (n, V) float32, without a gradient.

    PyTorch rounds the result of a bfloat16 product to bfloat16. That changes logits near 20 by up to 0.06 and
    causes half of the error in the log-probs. Where a weight cannot be packed, both factors are therefore
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
    if PackedWeight.supports(weight):
        packed = PackedWeight(weight, bias)
        return lambda hidden: packed(hidden, torch.float32)
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return lambda hidden: F.linear(hidden, weight, bias).float()
    wide, wide_bias = weight.float(), map_bias(torch.Tensor.float, bias)
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # torch swaps this module for an object

    def head(hidden: torch.Tensor) -> torch.Tensor:
        before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
        try:
            return F.linear(hidden.float(), wide, wide_bias)
        finally:
            matmul.fp32_precision = before

    return head
