"""Sample all completions of a step in one batch, in smaller batches if memory runs out, or across processes.

Splitting the batch does not change any completion, because each one draws the same random numbers as in the
full batch.
"""

from dataclasses import replace

import torch
from transformers import PreTrainedModel

from src import parallel
from src.engine import static_decoder
from src.engine.memory import BatchSize
from src.engine.sampler import Samples, Sampling, sample


def roll_out(
    policy: PreTrainedModel,
    prompt_ids: list[list[int]],
    group_size: int,
    sampling: Sampling,
    generator: torch.Generator,
    at_once: BatchSize,
    free_cache: bool = False,
) -> Samples:
    """Sample `group_size` completions of each of Q prompts.

    Args:
        generator: A random generator that has the same state in every process, before and after the call.
        at_once: How many completions to sample in one batch.
        free_cache: Free the decoder's cache on a GPU afterwards, which `static_decoder` otherwise keeps.

    Returns:
        All B = Q x group_size completions. Every process returns all of them.
    """
    start = generator.get_state()

    def sample_mine(size: int) -> tuple[list[Samples], list[tuple[int, torch.Tensor]]]:
        parts = []
        ends = []  # for each part: how many numbers each row drew, and the generator's state after that
        for first, prompts, group in batches(prompt_ids, parallel.share(len(prompt_ids)), group_size, size):
            generator.set_state(start)
            part_of = (first, len(prompt_ids) * group_size)
            parts.append(sample(policy, prompts, group, sampling, generator, part_of))
            ends.append((int(parts[-1].lengths.max()), generator.get_state()))
        return parts, ends

    parts, ends = at_once.fit(sample_mine)
    if free_cache:
        static_decoder.release()
    generator.set_state(max(parallel.gather(ends), key=lambda end: end[0])[1])
    if parallel.processes() > 1:
        everywhere = parallel.gather([part.to(torch.device("cpu")) for part in parts])
        parts = [part.to(policy.device) for part in everywhere]
    return replace(join(parts, sampling.pad_id), group_size=group_size)


def batches(
    prompt_ids: list[list[int]], mine: slice, group_size: int, at_once: int
) -> list[tuple[int, list[list[int]], int]]:
    """Split the completions of some prompts into batches of at most `at_once` completions.

    A batch consists of complete groups if at least one group fits, and otherwise of part of one group.

    Returns:
        For each batch: the index of its first row in the full batch, its prompts, and the number of
            completions of each prompt.
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


def join(parts: list[Samples], pad_id: int) -> Samples:
    """Join several batches into one, padding all rows to the longest."""
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
        group_size=parts[0].group_size,
    )
