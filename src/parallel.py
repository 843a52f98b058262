"""Several processes that train one policy (`accelerate launch`): dividing the work, combining the results.

Every process samples, judges and scores the completions of its own questions. The results are then gathered
in every process, so that all compute the same advantages, and each process computes its part of every
optimizer step's gradient. With a single process, these functions change nothing.
"""

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
import torch.distributed as dist

from src.errors import InputError

T = TypeVar("T")
IntOrFloat = TypeVar("IntOrFloat", int, float)
# accelerate's settings: values that change nothing, and what to use instead of others
ACCELERATE_SETTINGS = {
    "ACCELERATE_USE_FSDP": (("false", "0", "no"), "use verl for models that need several GPUs"),
    "ACCELERATE_USE_DEEPSPEED": (("false", "0", "no"), "use verl for models that need several GPUs"),
    "ACCELERATE_USE_MEGATRON_LM": (("false", "0", "no"), "use verl for models that need several GPUs"),
    "ACCELERATE_MIXED_PRECISION": (("no",), "use --dtype"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (("1",), "use --train-batch-size and --micro-batch-size"),
    "ACCELERATE_DYNAMO_BACKEND": (("no",), "leave compiling to this program"),
}


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def share(n: int) -> slice:
    """This process's contiguous share of n things. Shares differ in size by at most one."""
    return slice(n * rank() // processes(), n * (rank() + 1) // processes())


def gather(items: list[T]) -> list[T]:
    """Concatenate the lists of all processes, in order of rank.

    The lists are sent as pickles, which is safe only because we trust our own processes.
    """
    if processes() == 1:
        return items
    lists: list = [None] * processes()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def from_first(make: Callable[[], T]) -> T:
    """Call `make` in the first process only, and return its result in all of them."""
    return gather([make()] if rank() == 0 else [])[0]


def sum_gradients(parameters: list[torch.Tensor]) -> None:
    """Replace each gradient by its sum over all processes. A missing gradient counts as zeros.

    The sums are bit for bit the same in all processes.
    """
    if processes() == 1:
        return
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        add_up(p.grad)


def add_up(tensor: torch.Tensor) -> torch.Tensor:
    """Replace a tensor, in place, by its sum over all processes, and return it."""
    if processes() > 1:
        dist.all_reduce(tensor)
    return tensor


def sum_values(values: dict[str, IntOrFloat]) -> dict[str, IntOrFloat]:
    """Sum each value over all processes."""
    everywhere = gather([values])
    return {name: sum(v[name] for v in everywhere) for name in values}


def check_accelerate(environment: Mapping[str, str]) -> None:
    """Refuse accelerate's own settings that this program would ignore.

    Raises:
        InputError: One of them is set, by hand or by `accelerate launch`.
    """
    for name, (harmless, instead) in ACCELERATE_SETTINGS.items():
        value = environment.get(name, "")
        if value.lower() not in ("", *harmless):
            raise InputError(f"{name}={value}: is not supported and would be ignored; unset it and {instead}")
