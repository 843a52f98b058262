"""Count what a computation would do on a GPU, without one: its memory, traffic, operations and kernels."""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

# Attainable on an H100: the roofline of a kernel is the longer of its operations and its traffic.
MATRIX_RATE = 700e12  # operations per second, in bfloat16
MEMORY_RATE = 3.0e12  # bytes per second
PEAK_RATE = 989e12  # what the data sheet says, for the model FLOP utilization

# Operations that allocate memory but run no kernel, besides views
NO_KERNEL = (
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "_unsafe_view",
    "detach",
)
# Operations that read or write only the entries that the other arguments select
GATHERS = ("embedding", "index", "index_select", "gather")
SCATTERS = (
    "index_put",
    "index_put_",
    "_index_put_impl_",
    "index_add_",
    "scatter_add_",
    "embedding_dense_backward",
)


def tensors_in(tree: object) -> list[torch.Tensor]:
    """All tensors in nested tuples, lists and dictionaries."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def size_of(tree: object) -> float:
    """Bytes of all tensors in a tree."""
    return float(sum(tensor.numel() * tensor.itemsize for tensor in tensors_in(tree)))


class Allocations(TorchDispatchMode):
    """Counts the bytes of all blocks of memory that exist at a time.

    Args:
        existing: Tensors from before, which are not counted.

    Attributes:
        now, peak: Bytes in use now, and at most so far.
    """

    def __init__(self, existing: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in existing}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tensors_in(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return out

    def _freed(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.now -= size


@dataclass
class Kernels:
    """Totals of the kernels of one name."""

    launches: int = 0
    bytes: float = 0.0  # read and written
    operations: float = 0.0
    seconds: float = 0.0  # at the roofline


@dataclass
class Traffic:
    """What `count_traffic` counts."""

    kernels: dict[str, Kernels] = field(default_factory=dict)  # by name
    reads: int = 0  # times that the host waits for a value from the device
    uploads: int = 0  # copies from the host to the device

    def add(self, name: str, size: float, operations: float = 0.0) -> None:
        """Count a kernel."""
        kernels = self.kernels.setdefault(name, Kernels())
        kernels.launches += 1
        kernels.bytes += size
        kernels.operations += operations
        kernels.seconds += max(size / MEMORY_RATE, operations / MATRIX_RATE)

    @property
    def total(self) -> Kernels:
        """Totals of all kernels."""
        kernels = self.kernels.values()
        return Kernels(
            sum(k.launches for k in kernels),
            sum(k.bytes for k in kernels),
            sum(k.operations for k in kernels),
            sum(k.seconds for k in kernels),
        )


class _Count(TorchDispatchMode):
    """Counts in a `Traffic`, unless it is paused.

    Args:
        answers: What each value that the host reads is said to be, on devices without values.
    """

    def __init__(self, traffic: Traffic, device: str, answers: float):
        super().__init__()
        self.traffic, self.device, self.answers, self.paused = traffic, device, answers, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        if name == "_local_scalar_dense" and args[0].device.type == self.device:
            self.traffic.reads += 1
            return bool(self.answers) if args[0].dtype == torch.bool else self.answers
        out = func(*args, **kwargs)
        inputs, outputs = tensors_in((args, kwargs)), tensors_in(out)
        here = [tensor for tensor in (*inputs, *outputs) if tensor.device.type == self.device]
        if self.paused or not here or func.is_view or name in NO_KERNEL or func.namespace == "prim":
            return out
        if name in ("_to_copy", "copy_"):
            self.traffic.reads += outputs[0].device.type == "cpu"
            self.traffic.uploads += any(tensor.device.type == "cpu" for tensor in inputs)
        counted = flop_registry.get(func._overloadpacket)
        operations = float(counted(*args, **kwargs, out_val=out)) if counted and "flash" not in name else 0.0
        self.traffic.add(name, traffic_of(name, args, kwargs, out), operations)
        return out


def traffic_of(name: str, args: Any, kwargs: dict[str, Any], out: Any) -> float:
    """Bytes that a kernel reads and writes."""
    if name == "_flash_attention_forward" and kwargs.get("seqused_k") is not None:
        queries, keys, ends, longest = args[0], args[1], args[3], args[6]
        # Every key and value of a sequence, as if all sequences were as long as the longest
        return size_of((queries, out[0])) + 2.0 * (len(ends) - 1) * longest * keys[0].numel() * keys.itemsize
    if name in GATHERS:
        return size_of(args[1:]) + 2 * size_of(out)
    if name in SCATTERS:
        return 2 * size_of(args[1:]) + (size_of(out) if name == "embedding_dense_backward" else 0.0)
    if name.endswith("_"):  # writes its first argument
        return size_of((args, kwargs)) + size_of(args[0])
    return size_of((args, kwargs, out))


_counting: list[_Count] = []


@contextmanager
def count_traffic(device: str, answers: float = 1) -> Iterator[Traffic]:
    """Count the kernels that run on a device inside the `with` block.

    Args:
        device: The type of a device without values: meta, or cuda inside a FakeTensorMode.
        answers: What each value that the host reads is said to be.
    """
    count = _Count(Traffic(), device, answers)
    _counting.append(count)
    try:
        with count:
            yield count.traffic
    finally:
        _counting.pop()


@contextmanager
def as_one_kernel(name: str, *read: torch.Tensor | None) -> Iterator[list[torch.Tensor]]:
    """Count what runs inside the `with` block as a single kernel, if anything is counted.

    Args:
        read: The tensors that the kernel reads; the block appends those that it writes to the list.
    """
    written: list[torch.Tensor] = []
    if not _counting:
        yield written
        return
    count = _counting[-1]
    before, count.paused = count.paused, True
    try:
        yield written
    finally:
        count.paused = before
    if not before:
        count.traffic.add(name, size_of((read, written)))
