"""Several processes that train one policy (`accelerate launch`): what they share out and what they put together again.

Every process samples, judges and scores the completions of its own questions; then all have all of them, compute the same
advantages, and each takes its part of every optimizer step's gradient. With one process these functions hand back what they
are given.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
Number = TypeVar("Number", int, float)


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def share(n: int) -> slice:
    """This process's part of n things: as many as every other's, one more or less, and side by side."""
    return slice(n * rank() // processes(), n * (rank() + 1) // processes())


def gather(items: list[T]) -> list[T]:
    """The lists of all processes, one behind the other in order of rank. Pickled, so for our own processes alone."""
    if processes() == 1:
        return items
    lists: list = [None] * processes()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def from_first(make: Callable[[], T]) -> T:
    """What the first process makes, in all of them; the others make nothing."""
    return gather([make()] if rank() == 0 else [])[0]


def sum_gradients(parameters: list[torch.Tensor]) -> None:
    """Give every process the sum of all processes' gradients, bit for bit the same; none counts as zeros."""
    if processes() == 1:
        return
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        add_up(p.grad)


def add_up(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over all processes of a tensor, which is changed in place."""
    if processes() > 1:
        dist.all_reduce(tensor)
    return tensor


def sum_values(values: dict[str, Number]) -> dict[str, Number]:
    """The sum over all processes of each value."""
    everywhere = gather([values])
    return {name: sum(v[name] for v in everywhere) for name in values}
