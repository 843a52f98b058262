"""Tensors that live in host memory and are copied to the device only while they are needed."""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch


class Offloaded:
    """Tensors that live in host memory, and are on the device only inside `with offloaded.on_device():`.

    The host memory is pinned if the device is a GPU. Tensors that share memory (tied weights), or whose
    memory is adjacent (`architecture.join_weights`), still do so on the device.

    Args:
        tensors: Returns the tensors. It is called at each visit, because an optimizer creates its state only
            in its first step.
        device: Where the tensors are needed.
        change: Whether they may change on the device, so that they must be copied back.
    """

    def __init__(
        self, tensors: Callable[[], Iterable[torch.Tensor]], device: torch.device, change: bool = False
    ):
        self.tensors, self.device, self.change = tensors, device, change
        self.homes: dict[int, torch.Tensor] = {}  # blocks of bytes in host memory, by their address
        self.guests: dict[int, torch.Tensor] = {}  # the home of each block on the device, by its address
        self.park()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Keep the tensors on the device inside the `with` block."""
        try:
            for block in find_blocks(self.tensors()):
                home = block.bytes()
                guest = torch.empty_like(home, device=self.device).copy_(home, non_blocking=True)
                self.guests[guest.data_ptr()] = home
                block.move_to(guest)
            yield
        finally:
            self.park()

    @torch.no_grad()
    def park(self) -> None:
        """Move the tensors that are on the device, and new ones, to host memory."""
        homes = {}
        for block in find_blocks(self.tensors()):
            where = block.bytes()
            home = self.homes.get(where.data_ptr())
            if home is None:
                home = self.guests.get(where.data_ptr())
                if home is None:  # a new tensor
                    home = torch.empty(where.shape, dtype=where.dtype)
                    if self.device.type == "cuda":
                        pin(home, self.device)
                    home.copy_(where)
                elif self.change:
                    home.copy_(where, non_blocking=True)
                block.move_to(home)
            homes[home.data_ptr()] = home
        if self.change and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the host may read the tensors as soon as this returns
        self.homes, self.guests = homes, {}


class Block:
    """Tensors whose memory overlaps or is adjacent, in the order of their addresses."""

    def __init__(self, first: torch.Tensor):
        self.tensors = [first]
        self.start, self.end = first.data_ptr(), first.data_ptr() + first.nbytes

    def accepts(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor with a later address starts within the block or at its end."""
        same = tensor.untyped_storage().data_ptr() == self.tensors[0].untyped_storage().data_ptr()
        return same and tensor.data_ptr() <= self.end

    def add(self, tensor: torch.Tensor) -> None:
        self.tensors.append(tensor)
        self.end = max(self.end, tensor.data_ptr() + tensor.nbytes)

    def bytes(self) -> torch.Tensor:
        """The block's memory, (n,) uint8."""
        storage = self.tensors[0].untyped_storage()
        start = self.start - storage.data_ptr()
        empty = torch.empty(0, dtype=torch.uint8, device=storage.device)
        return empty.set_(storage, start, (self.end - self.start,), (1,))

    def move_to(self, place: torch.Tensor) -> None:
        """Make the tensors views of another block of bytes, which already has their values."""
        for tensor in self.tensors:
            offset = (tensor.data_ptr() - self.start) // tensor.itemsize
            empty = torch.empty(0, dtype=tensor.dtype, device=place.device)
            tensor.data = empty.set_(place.untyped_storage(), offset, tensor.shape, tensor.stride())


def find_blocks(tensors: Iterable[torch.Tensor]) -> list[Block]:
    """Group dense tensors whose memory overlaps or is adjacent."""
    blocks: list[Block] = []
    for tensor in sorted(set(tensors), key=torch.Tensor.data_ptr):  # each once, even if it is tied
        if blocks and blocks[-1].accepts(tensor):
            blocks[-1].add(tensor)
        elif tensor.numel():
            blocks.append(Block(tensor))
    return blocks


def pin(tensor: torch.Tensor, device: torch.device) -> None:
    """Pin a tensor's memory where it is; pin_memory() would round its size up to a power of two.

    If the system refuses, transfers to the device are slower, but nothing else changes.
    """
    runtime, address = torch.cuda.cudart(), tensor.data_ptr()
    if int(runtime.cudaHostRegister(address, tensor.nbytes, 0)):
        with contextlib.suppress(RuntimeError):  # the next kernel reports the error as its own
            torch.zeros(1, device=device)
    else:
        weakref.finalize(tensor, runtime.cudaHostUnregister, address).atexit = False
