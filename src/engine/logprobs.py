"""Log-probabilities of given completions under a model: the current policy or the reference.

A question's completions share one packed row, after a single copy of their prompt. Each completion's
positions continue from the prompt, and a mask keeps the completions apart. The model therefore reads the
prompt only once, and there is little padding. Logits are computed only for completion tokens, one block of
the vocabulary at a time, and are recomputed in the backward pass, because the full logits of a batch would be
larger than the bundled model itself.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from src.engine import architecture, cuda_llama, llama
from src.engine.sampler import Samples
from src.engine.token_log_probs import TokenLogProbs

PASS_COST = 64  # the cost of one more forward and backward pass, in tokens
PACKED_TOKENS = 768  # the length limit of a packed row, because attention is quadratic
REFERENCE_PASS = 4  # how many times as many completions a pass of the reference holds: it keeps nothing


@dataclass
class MicroBatch:
    """Completions that go through the model in one pass."""

    rows: torch.Tensor  # (b,) int64 on the CPU, the completions' indices among the B samples
    packed: list[list[int]]  # the same indices, grouped by packed row
    width: int  # number of columns of the (B, T-1) tensors that they use


class _PackedRow(NamedTuple):
    tokens: int  # number of tokens in the prompt and all completions
    rows: list[int]  # the completions' indices among the B samples


class _Sequence(NamedTuple):
    """A completion with its prompt, as token ids."""

    prompt: list[int]
    completion: list[int]


def micro_batches(
    model: PreTrainedModel, samples: Samples, rows: torch.Tensor, size: int
) -> list[MicroBatch]:
    """Split completions into passes of at most `size`, at the lowest total cost of padding and passes.

    The completions of a question share packed rows of at most PACKED_TOKENS tokens. The packed rows are
    sorted by length, and dynamic programming finds the best way to cut them into passes. The cost of a pass
    is its number of packed rows times the length of the longest one, in tokens, plus PASS_COST. If `llama.py`
    or `cuda_llama.py` runs the model, nothing is padded, so packed rows may have any length, and the cost of
    a pass is its number of tokens plus PASS_COST.

    Args:
        model: If it can't be packed (`architecture.can_pack`), each packed row holds a single completion.
        samples: B completions.
        rows: (n,) int64 on the CPU, the indices of the completions to split.
        size: Maximum number of completions in a pass.
    """
    padded = not (llama.is_supported(model) or cuda_llama.is_supported(model))
    packed = _pack(
        samples, rows, size if architecture.can_pack(model) else 1, PACKED_TOKENS if padded else None
    )
    lengths = samples.host.attention_mask.sum(dim=1)  # (B,)
    longest_prompt = int((lengths - samples.host.lengths).max())
    # The memory plan counts on this limit, even if few completions of each question are left.
    completions, prompts = largest_pass(size, samples.group_size)
    max_tokens = completions * int(samples.host.lengths.max()) + prompts * longest_prompt
    batches = []
    for packed_rows in _cheapest_passes(packed, size, None if padded else max_tokens):
        groups = [packed_row.rows for packed_row in packed_rows]
        flat = [row for group in groups for row in group]
        batches.append(MicroBatch(torch.tensor(flat), groups, int(lengths[flat].max()) - 1))
    return batches


def largest_pass(size: int, group_size: int) -> tuple[int, int]:
    """How many completions and prompts an unpadded pass of at most `size` completions has at most.

    They are as many complete groups as fit, or part of one group.
    """
    groups = size // group_size
    return (groups * group_size, groups) if groups else (size, 1)


def _pack(samples: Samples, rows: torch.Tensor, size: int, max_tokens: int | None) -> list[_PackedRow]:
    """Pack completions of the same question together, at most `size` in a packed row, and sort the result.

    Args:
        max_tokens: Maximum number of tokens in a packed row that holds several completions; None means no
            limit.
    """
    lengths = samples.host.attention_mask.sum(dim=1).tolist()
    completion_lengths = samples.host.lengths.tolist()
    group_size = samples.group_size
    packed: list[_PackedRow] = []
    for row in sorted(rows.tolist(), key=lambda r: (r // group_size, lengths[r], r)):
        if packed and packed[-1].rows[0] // group_size == row // group_size and len(packed[-1].rows) < size:
            tokens = packed[-1].tokens + completion_lengths[row]
            if max_tokens is None or tokens <= max_tokens:
                packed[-1] = _PackedRow(tokens, [*packed[-1].rows, row])
                continue
        packed.append(_PackedRow(lengths[row], [row]))
    return sorted(packed)


def _cheapest_passes(packed: list[_PackedRow], size: int, max_tokens: int | None) -> list[list[_PackedRow]]:
    """Cut sorted packed rows into passes of at most `size` completions; see `micro_batches` for the costs.

    Args:
        max_tokens: Maximum number of tokens in a pass of several packed rows; None if rows are padded.
    """
    # best[i]: the lowest cost of the first i packed rows, and where their last pass starts
    best: list[tuple[float, int]] = [(0.0, 0)]
    for i in range(1, len(packed) + 1):
        options, completions, total = [], 0, 0
        for j in range(i - 1, -1, -1):
            completions, total = completions + len(packed[j].rows), total + packed[j].tokens
            if completions > size or (max_tokens is not None and j < i - 1 and total > max_tokens):
                break
            cost = (i - j) * packed[i - 1].tokens if max_tokens is None else total
            options.append((best[j][0] + cost + PASS_COST, j))
        best.append(min(options))
    passes, end = [], len(packed)
    while end:
        start = best[end][1]
        passes.append(packed[start:end])
        end = start
    return passes[::-1]


def completion_log_probs(
    model: PreTrainedModel, samples: Samples, batch: MicroBatch, temperature: float
) -> torch.Tensor:
    """Log-probabilities of the sampled tokens of some completions, under the tempered distribution.

    Args:
        model: A causal language model whose output head passes `models.check_head`.
        samples: B completions.
        batch: b of the completions, from `micro_batches`.
        temperature: The sampling temperature, above 0. The logits are divided by it before the softmax.

    Returns:
        The log-probs (b, width) float32, in nats, in the order of `batch.rows`, 0 outside the mask. They are
        differentiable with respect to the weights that require gradients.
    """
    assert samples.action_mask.shape == samples.sequence_ids[:, 1:].shape
    device = samples.sequence_ids.device
    mask = samples.host.action_mask[batch.rows, : batch.width]  # (b, width)
    if llama.is_supported(model):
        ids, predictors, lengths = _flat_inputs(samples, batch.packed)
        hidden = llama.packed_hidden(model, ids, llama.Layout.of(*lengths))
    elif cuda_llama.is_supported(model):
        ids, predictors, lengths = _flat_inputs(samples, batch.packed)
        layout = cuda_llama.Layout.of(*lengths, device)
        hidden = cuda_llama.packed_hidden(model, ids.to(device), layout)
    else:
        inputs, predictors = _padded_inputs(samples, batch.packed, model.dtype)
        hidden = architecture.backbone(model)(**inputs, use_cache=False).last_hidden_state  # (R, S, D)
        hidden = hidden.flatten(0, 1)
    # A prompt's last token predicts the first token of every completion, so the gradients from all
    # completions are summed at that token. In float32, the gradient of hidden[predictors] adds them with
    # atomic operations, in an order that differs from run to run. The gradient of index_select adds them in a
    # fixed order, that of the predictors.
    hidden = hidden.index_select(0, predictors.to(device))  # (N, D) for N sampled tokens, row by row
    targets = samples.host.sequence_ids[batch.rows, 1 : batch.width + 1][mask].to(device)  # (N,)
    head = model.get_output_embeddings()
    token_log_probs = TokenLogProbs.apply(hidden, head.weight, head.bias, targets, temperature)
    log_probs = torch.zeros(mask.shape, dtype=torch.float32, device=device)
    # Indices found on the host, because a mask on a GPU would make the host wait for it.
    return log_probs.index_put(tuple(i.to(device) for i in mask.nonzero(as_tuple=True)), token_log_probs)


# ----------------------------------------------------------------------------------------------------------
# The inputs of a pass


def _sequences(samples: Samples, rows: list[int]) -> list[_Sequence]:
    ids = samples.host.sequence_ids[rows].tolist()
    counts = samples.host.action_mask[rows].sum(dim=1).tolist()  # tokens of each completion
    ends = samples.host.attention_mask[rows].sum(dim=1).tolist()
    return [_Sequence(i[: end - n], i[end - n : end]) for i, n, end in zip(ids, counts, ends, strict=True)]


def _flat_inputs(
    samples: Samples, packed: list[list[int]]
) -> tuple[torch.Tensor, torch.Tensor, tuple[list[int], list[list[int]]]]:
    """Lay out all prompts, then all completions, without padding, for `packed_hidden`.

    Returns:
        Token ids (n,), for each of the N sampled tokens the index of the token before it, and the lengths of
        the prompts and of each prompt's completions.
    """
    groups = [_sequences(samples, rows) for rows in packed]
    prompts = [group[0].prompt for group in groups]
    # A completion's last token predicts nothing, so it is left out.
    completions = [[sequence.completion[:-1] for sequence in group] for group in groups]
    ids = [i for prompt in prompts for i in prompt]
    predictors, last = [], -1
    for prompt, group in zip(prompts, completions, strict=True):
        last += len(prompt)  # a prompt's last token predicts the first token of every completion
        for completion in group:
            predictors += [last, *range(len(ids), len(ids) + len(completion))]
            ids += completion
    lengths = [len(p) for p in prompts], [[len(c) for c in group] for group in completions]
    return torch.tensor(ids), torch.tensor(predictors), lengths


@dataclass
class _RowInputs:
    """The tokens of one packed row, before padding."""

    ids: list[int]
    positions: list[int]
    segments: list[int]  # 0 in the prompt, then 1, 2, ... in the completions
    predictors: list[int]  # for each sampled token, the column of the token before it


def _row_inputs(group: list[_Sequence]) -> _RowInputs:
    """Put a prompt and its completions one after the other into one packed row."""
    prompt = group[0].prompt
    start = len(prompt)
    row = _RowInputs(list(prompt), list(range(start)), [0] * start, [])
    for segment, sequence in enumerate(group, start=1):
        # The prompt's last token predicts the completion's first token, and each completion token predicts
        # the next one. The completion's last token predicts nothing, so it is left out.
        inputs = sequence.completion[:-1]
        row.predictors += [start - 1, *range(len(row.ids), len(row.ids) + len(inputs))]
        row.ids += inputs
        row.positions += range(start, start + len(inputs))
        row.segments += [segment] * len(inputs)
    return row


def _padded_inputs(
    samples: Samples, packed: list[list[int]], dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Lay out R packed rows for the model's own forward pass.

    Returns:
        The model's inputs, and, for each of the N sampled tokens, the index of the token before it in the
        flattened inputs (R x S). The inputs are (R, S), except that the attention mask is (R, 1, S, S) if any
        packed row holds several completions.
    """
    device = samples.sequence_ids.device
    flat = [row for rows in packed for row in rows]
    sequences = dict(zip(flat, _sequences(samples, flat), strict=True))
    inputs = [_row_inputs([sequences[row] for row in rows]) for rows in packed]
    width = max(len(row.ids) for row in inputs)  # S

    def pad(rows: list[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([row + [fill] * (width - len(row)) for row in rows], device=device)

    predictors = [i * width + column for i, row in enumerate(inputs) for column in row.predictors]
    segments = pad([row.segments for row in inputs], -1)  # (R, S)
    if all(len(rows) == 1 for rows in packed):
        mask = (segments >= 0).long()
    else:
        # (R, S, S): query and key are in the same completion, both in the prompt, or both padding
        same = segments[:, :, None] == segments[:, None, :]
        # Every token attends to itself, even a padding token, so no row of the mask is empty.
        allowed = (same | (segments[:, None, :] == 0)).tril()
        # A mask that is added to the scores works with every attention implementation.
        blocked = torch.finfo(dtype).min
        mask = torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill(~allowed, blocked)[:, None]
    return {
        "input_ids": pad([row.ids for row in inputs], 0),
        "position_ids": pad([row.positions for row in inputs], 0),
        "attention_mask": mask,
    }, torch.tensor(predictors, dtype=torch.long, device=device)
