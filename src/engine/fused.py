"""Functions that torch.compile turns into a few GPU kernels, which do not store intermediate results."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from src.console import warn
from src.errors import first_line


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function for CUDA tensors. If that fails, and on a CPU, it runs as it is.

    The first dimension of every tensor with more than one dimension may vary without another compilation.
    """
    compiled: Callable[..., Any] | None = None
    failed = False

    @functools.wraps(function)
    def run(x: torch.Tensor, *args: Any) -> Any:
        nonlocal compiled, failed
        if x.device.type != "cuda" or failed:
            return function(x, *args)
        compiled = compiled or torch.compile(function)  # not earlier: it imports the compiler, for a second
        for tensor in (x, *args):
            if isinstance(tensor, torch.Tensor) and tensor.dim() > 1:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        try:
            return compiled(x, *args)
        except torch._dynamo.exc.TorchDynamoException as error:
            name = function.__name__
            warn(
                f"{name} could not be compiled, so it is slower ({type(error).__name__}: {first_line(error)})"
            )
            failed = True
            return function(x, *args)

    return run
