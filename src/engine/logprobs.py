"""Log-probabilities of given completions under a model: the current policy or the reference.

A question's completions share one packed row, after a single copy of their prompt. Each completion's
positions continue from the prompt, and a mask keeps the completions apart. The model therefore reads the
prompt only once, and there is little padding. Logits are computed only for completion tokens, one block of
the vocabulary at a time, and are recomputed in the backward pass, because the full logits of a batch would be
larger than the bundled model itself.
"""

from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from src.engine import architecture, cuda_llama, kernels, llama
from src.engine.linear import make_head, map_bias
from src.engine.sampler import Samples

PASS_COST = 64  # the cost of one more forward and backward pass, in tokens
PACKED_TOKENS = 768  # the length limit of a packed row, because attention is quadratic
VOCABULARY_BLOCK = 1024  # logits per token at a time on a CPU, so that 2,000 tokens fit in its cache


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
    prompts = -(-size // samples.group_size)
    max_tokens = size * int(samples.host.lengths.max()) + prompts * longest_prompt
    batches = []
    for packed_rows in _cheapest_passes(packed, size, None if padded else max_tokens):
        groups = [packed_row.rows for packed_row in packed_rows]
        flat = [row for group in groups for row in group]
        batches.append(MicroBatch(torch.tensor(flat), groups, int(lengths[flat].max()) - 1))
    return batches


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
        hidden = model.base_model(**inputs, use_cache=False).last_hidden_state  # (R, S, D)
        hidden = hidden.flatten(0, 1)
    # A prompt's last token predicts the first token of every completion, so the gradients from all
    # completions are summed at that token. In float32, the gradient of hidden[predictors] adds them with
    # atomic operations, in an order that differs from run to run. The gradient of index_select adds them in a
    # fixed order, that of the predictors.
    hidden = hidden.index_select(0, predictors.to(device))  # (N, D) for N sampled tokens, row by row
    targets = samples.host.sequence_ids[batch.rows, 1 : batch.width + 1][mask].to(device)  # (N,)
    head = model.get_output_embeddings()
    token_log_probs = _TokenLogProbs.apply(hidden, head.weight, head.bias, targets, temperature)
    log_probs = torch.zeros(mask.shape, dtype=torch.float32, device=device)
    # Indices found on the host, because a mask on a GPU would make the host wait for it.
    return log_probs.index_put(tuple(i.to(device) for i in mask.nonzero(as_tuple=True)), token_log_probs)


# ----------------------------------------------------------------------------------------------------------
# The output head


def vocabulary_block(device: str) -> int:
    """Maximum number of logits per token at a time; larger on a GPU, where each kernel launch has a cost."""
    return VOCABULARY_BLOCK if device == "cpu" else 8 * VOCABULARY_BLOCK


class LogSumExp:
    """Collects the log-sum-exp of tempered logits, one vocabulary block at a time, and the targets' logits.

    Args:
        targets: (n,) int64, the target vocabulary entry of each token.
    """

    def __init__(self, targets: torch.Tensor, temperature: float):
        self.targets, self.temperature = targets, temperature
        self.log_sum_exp = torch.full(targets.shape, -torch.inf, device=targets.device)  # (n,)
        self.target_logits = torch.empty_like(self.log_sum_exp)  # (n,), divided by the temperature

    def add(self, logits: torch.Tensor, start: int) -> None:
        """Add logits (n, v) float32 of the vocabulary entries starting at `start`. May change the logits."""
        logits.div_(self.temperature)
        self.log_sum_exp = torch.logaddexp(self.log_sum_exp, logits.logsumexp(dim=1))
        column, here = find_in_block(self.targets, start, logits.shape[1])
        self.target_logits = torch.where(here, logits.gather(1, column[:, None])[:, 0], self.target_logits)

    def value(self) -> torch.Tensor:
        """The log-sum-exp (n,) float32 of all logits so far."""
        return self.log_sum_exp


def find_in_block(targets: torch.Tensor, start: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns (n,) of targets (n,) in a vocabulary block, 0 if outside; and whether they are in it."""
    here = (targets >= start) & (targets < start + size)
    return torch.where(here, targets - start, 0), here


class _TokenLogProbs(torch.autograd.Function):
    """log_softmax((hidden W^T + b) / temperature) at the targets, one block of the vocabulary at a time.

    The gradient of target y's log-prob with respect to the logits is (onehot(y) - softmax) / temperature.
    Because this gradient is written out here, it can replace a block's logits in place, whereas autograd
    would keep and read several tensors as large as all the logits together.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
    ) -> torch.Tensor:
        """hidden (N, D), weight (V, D), bias (V,) or None, targets (N,) -> log-probs (N,) float32."""
        compiled = hidden.device.type == "cpu" and kernels.libraries() is not None
        log_sum_exp = (kernels.CompiledLogSumExp if compiled else LogSumExp)(targets, temperature)
        for block in _vocabulary_blocks(weight, bias):
            log_sum_exp.add(make_head(block.weight, block.bias)(hidden), block.entries.start)
        total = log_sum_exp.value()
        ctx.save_for_backward(hidden, weight, bias, targets, total)
        ctx.temperature = temperature
        ctx.compiled = compiled and hidden.dtype in (torch.float32, torch.bfloat16)
        return log_sum_exp.target_logits - total

    @staticmethod
    def backward(ctx: Any, d_log_probs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, targets, log_sum_exp = ctx.saved_tensors
        dtype, d_log_probs = hidden.dtype, d_log_probs.contiguous()
        d_target = d_log_probs[:, None] / ctx.temperature  # (N, 1), the gradient from onehot(y)
        if hidden.device.type == "cuda":
            return _gradients_on_gpu(ctx, d_target)
        d_hidden = weight[targets] * d_target  # (N, D) float32
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        d_bias = torch.empty_like(bias) if ctx.needs_input_grad[2] else None
        for block in _vocabulary_blocks(weight, bias):
            logits = F.linear(hidden, block.weight, block.bias)  # (N, v), rounded, as their gradient will be
            if ctx.compiled:
                kernels.logits_backward_(logits, ctx.temperature, log_sum_exp, d_log_probs)
                d_logits = logits
            else:
                logits = logits.float().div_(ctx.temperature).sub_(log_sum_exp[:, None])  # now log-probs
                d_logits = logits.exp_().mul_(-d_target).to(dtype)
            d_hidden += d_logits @ block.weight
            if d_weight is not None:
                torch.mm(d_logits.T, hidden, out=d_weight[block.entries])
            if d_bias is not None:
                torch.sum(d_logits, dim=0, out=d_bias[block.entries])
        if d_weight is not None:
            d_weight.index_add_(0, targets, (hidden * d_target).to(dtype))
        if d_bias is not None:
            d_bias.index_add_(0, targets, d_target[:, 0].to(dtype))
        return d_hidden.to(dtype), d_weight, d_bias, None, None


def _gradients_on_gpu(ctx: Any, d_target: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """The gradients of `_TokenLogProbs`, with the targets' part in the products: adding it to rows of the
    weight's gradient afterwards would round every sum, in an order that differs from run to run.

    Args:
        d_target: (N, 1) float32, the gradient of each target's logit.
    """
    hidden, weight, bias, targets, log_sum_exp = ctx.saved_tensors
    d_hidden = torch.zeros(hidden.shape, device=hidden.device)  # (N, D) float32
    d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
    d_bias = torch.empty_like(bias) if ctx.needs_input_grad[2] else None
    for block in _vocabulary_blocks(weight, bias):
        logits = make_head(block.weight, block.bias)(hidden)  # (N, v)
        probs = logits.div_(ctx.temperature).sub_(log_sum_exp[:, None]).exp_()
        column, here = find_in_block(targets, block.entries.start, len(block.weight))
        d_logits = probs.mul_(-d_target).scatter_add_(1, column[:, None], d_target * here[:, None])
        rounded = d_logits.to(hidden.dtype)
        d_hidden += rounded @ block.weight
        if d_weight is not None:
            torch.mm(rounded.T, hidden, out=d_weight[block.entries])
        if d_bias is not None:
            torch.sum(d_logits, dim=0, out=d_bias[block.entries])
    return d_hidden.to(hidden.dtype), d_weight, d_bias, None, None


class _VocabularyBlock(NamedTuple):
    entries: slice  # v vocabulary entries
    weight: torch.Tensor  # (v, D)
    bias: torch.Tensor | None  # (v,)


def _vocabulary_blocks(weight: torch.Tensor, bias: torch.Tensor | None) -> list[_VocabularyBlock]:
    size = vocabulary_block(weight.device.type)
    parts = [slice(start, min(start + size, len(weight))) for start in range(0, len(weight), size)]
    return [_VocabularyBlock(p, weight[p], map_bias(itemgetter(p), bias)) for p in parts]


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
