"""The completions of a step, whatever they are sampled in: in one batch, in halves where memory runs out, by several processes.

How a batch is cut changes no completion: each draws the random numbers that it would draw in the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers import PreTrainedModel

from src import parallel, static_decoder
from src.sampler import Samples, Sampling, sample

if TYPE_CHECKING:
    from typing_extensions import Unpack  # Python 3.10 has none of its own

T = TypeVar("T")


def fit_memory(compute: Callable[[int], T], size: int) -> tuple[T, int]:
    """compute(size), with half the size as often as memory runs out.

    Args:
        size: Completions at once at most.

    Returns:
        What was computed, and the size with which it was.

    Raises:
        RuntimeError: There is no memory for one completion, or another reason.
    """
    while True:
        try:
            return compute(size), size
        except RuntimeError as error:
            if size == 1 or not (isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)):
                raise
        static_decoder.release()  # its cache is as large as the batch that was too large
        # Outside of the handler, whose traceback would keep the failed attempt's tensors alive.
        clear_device_cache(garbage_collection=True)
        print(f"warning: out of memory; goes on with {size // 2} completions at once in place of {size}", flush=True)
        size //= 2


def roll_out(
    policy: PreTrainedModel,
    prompt_ids: list[list[int]],
    group_size: int,
    at_once: int,
    *,
    generator: torch.Generator,
    **sampling: Unpack[Sampling],
) -> tuple[Samples, int]:
    """Sample `group_size` completions of each of Q prompts; see `sampler.sample` for what else there is to say.

    Args:
        at_once: Completions in one batch at most.
        generator: In the same state in every process, and afterwards again.

    Returns:
        All B = Q x group_size completions, in every process, and the number at once that memory had room for.
    """
    begun = generator.get_state()

    def sample_mine(size: int) -> tuple[list[Samples], list[tuple[int, torch.Tensor]]]:
        parts, ends = [], []  # of each part, the numbers drawn and the generator's state after them
        for first, prompts, group in batches(prompt_ids, parallel.share(len(prompt_ids)), group_size, size):
            generator.set_state(begun)
            part_of = (first, len(prompt_ids) * group_size)
            parts.append(sample(policy, prompts, group, generator=generator, part_of=part_of, **sampling))
            ends.append((max(map(len, parts[-1].completion_ids)), generator.get_state()))
        return parts, ends

    (parts, ends), at_once = fit_memory(sample_mine, at_once)
    generator.set_state(max(parallel.gather(ends), key=lambda end: end[0])[1])
    if parallel.processes() > 1:
        parts = [on(part, policy.device) for part in parallel.gather([on(part, torch.device("cpu")) for part in parts])]
    return join(parts, sampling["pad_id"]), at_once


def batches(prompt_ids: list[list[int]], mine: slice, group_size: int, at_once: int) -> list[tuple[int, list[list[int]], int]]:
    """Cut the completions of some prompts into batches of at most `at_once`: whole groups, or else parts of one.

    Returns:
        Of each batch, the first of its rows in the whole, its prompts, and its completions of each.
    """
    if at_once >= group_size:
        size = at_once // group_size
        starts = range(mine.start, mine.stop, size)
        return [(i * group_size, prompt_ids[i : min(i + size, mine.stop)], group_size) for i in starts]
    return [
        (i * group_size + j, [prompt_ids[i]], min(at_once, group_size - j))
        for i in range(mine.start, mine.stop)
        for j in range(0, group_size, at_once)
    ]


def on(samples: Samples, device: torch.device) -> Samples:
    """The same on another device."""
    moved: dict[str, Any] = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in vars(samples).items()}
    return Samples(**moved)


def join(parts: list[Samples], pad_id: int) -> Samples:
    """One batch of several, each padded to the longest."""
    if len(parts) == 1:
        return parts[0]
    length = max(part.sequence_ids.shape[1] for part in parts)

    def column(name: str, width: int, fill: float) -> torch.Tensor:
        rows = [getattr(part, name) for part in parts]
        return torch.cat([torch.nn.functional.pad(r, (0, width - r.shape[1]), value=fill) for r in rows])

    return Samples(
        sequence_ids=column("sequence_ids", length, pad_id),
        attention_mask=column("attention_mask", length, False),
        action_mask=column("action_mask", length - 1, False),
        log_probs=column("log_probs", length - 1, 0.0),
        finished=torch.cat([part.finished for part in parts]),
        completion_ids=[ids for part in parts for ids in part.completion_ids],
    )
