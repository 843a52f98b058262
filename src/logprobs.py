"""Log-probabilities of given completions under a model: one path for the current policy and for the reference.

A question's completions lie behind one copy of their prompt in one packed row: positions restart at each, and a mask keeps
them apart, so that the prompt is computed once and nothing is padding. Logits exist for completion tokens only, for a block
of the vocabulary at a time, and are computed again in the backward pass: a batch's full logits would be larger than the
embedded model itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from src import kernels, llama

PASS_COST = 64  # what one more forward and backward pass costs, in tokens of a pass
PACKED_TOKENS = 768  # a packed row grows to this: attention looks at its square
VOCABULARY_BLOCK = 1024  # logits of a token at once on a CPU: of 2,000 tokens they stay in its cache


@dataclass
class MicroBatch:
    """Completions that go through the model in one pass."""

    rows: torch.Tensor  # (b,) int64 on the CPU, their rows in the batch of B
    packed: list[list[int]]  # the same rows, those of each packed row together
    width: int  # columns of (B, T-1) tensors that they reach into


def can_pack(model: PreTrainedModel) -> bool:
    """Whether every layer of a model attends to all tokens before; a sliding window would not see the packed mask."""
    layers = getattr(model.config, "layer_types", None) or []
    window = getattr(model.config, "sliding_window", None)
    return all(kind == "full_attention" for kind in layers) if layers else window is None


def micro_batches(
    model: PreTrainedModel,
    attention_mask: torch.Tensor,
    action_mask: torch.Tensor,
    rows: torch.Tensor,
    group_size: int,
    size: int,
) -> list[MicroBatch]:
    """Split completions into passes of at most `size`, so that padding and passes together cost least.

    The completions of a question share packed rows of at most PACKED_TOKENS. Packed rows are sorted by length, and the
    best cuts between passes are found by dynamic programming: a pass costs its rows x its longest row, in tokens, and
    PASS_COST more. Where `llama.py` computes the model, rows grow as they will and a pass costs its tokens: nothing is padded.

    Args:
        model: Decides by `can_pack` whether rows are packed or hold one completion each.
        attention_mask: (B, T), true for real tokens.
        action_mask: (B, T-1) bool, true where token t + 1 was sampled.
        rows: (n,) int64 on the CPU, the completions to split; group_size of them, side by side in the batch, share a prompt.
        size: Completions of a pass at most.
    """
    lengths = attention_mask.sum(dim=1).tolist()
    completion_lengths = action_mask.sum(dim=1).tolist()
    share, padded = can_pack(model), not llama.fits(model)
    packed: list[tuple[int, list[int]]] = []  # tokens and rows of each packed row
    for row in sorted(rows.tolist(), key=lambda r: (r // group_size, lengths[r], r)):
        tokens, members = packed[-1] if packed else (0, [])
        fits = (tokens + completion_lengths[row] <= PACKED_TOKENS or not padded) and len(members) < size
        if share and members and members[0] // group_size == row // group_size and fits:
            packed[-1] = (tokens + completion_lengths[row], [*members, row])
        else:
            packed.append((lengths[row], [row]))
    packed.sort()

    best: list[tuple[float, int]] = [(0.0, 0)]  # cost of the first i packed rows, and where their last pass begins
    for i in range(1, len(packed) + 1):
        options, completions, total = [], 0, 0
        for j in range(i - 1, -1, -1):
            completions, total = completions + len(packed[j][1]), total + packed[j][0]
            if completions > size:
                break
            cost = (i - j) * packed[i - 1][0] if padded else total
            options.append((best[j][0] + cost + PASS_COST, j))
        best.append(min(options))
    passes, end = [], len(packed)
    while end:
        start = best[end][1]
        groups = [members for _, members in packed[start:end]]
        flat = [row for members in groups for row in members]
        passes.append(MicroBatch(torch.tensor(flat), groups, max(lengths[r] for r in flat) - 1))
        end = start
    return passes[::-1]


def completion_log_probs(
    model: PreTrainedModel, sequence_ids: torch.Tensor, action_mask: torch.Tensor, batch: MicroBatch, temperature: float
) -> torch.Tensor:
    """Log-probability of every sampled token of some completions, under the tempered distribution they were sampled from.

    Args:
        model: A causal language model; see `models.check_head` for what its output head may do.
        sequence_ids: (B, T) int64, prompt + completion, padded on the right.
        action_mask: (B, T-1) bool, true where token t + 1 was sampled by the policy.
        batch: The b completions, from `micro_batches`.
        temperature: Above 0; the logits are divided by it before the softmax.

    Returns:
        (b, width) float32, nats, in the order of `batch.rows`, 0 outside the mask; differentiable in the model's weights
        where they require grad.
    """
    assert action_mask.shape == sequence_ids[:, 1:].shape
    mask = action_mask[batch.rows, : batch.width]  # (b, width)
    if llama.fits(model):
        ids, layout, predictors = _flatten(sequence_ids, action_mask, batch.packed)
        hidden = llama.packed_hidden(model, ids, layout)
    else:
        inputs, predictors = _pack(sequence_ids, action_mask, batch.packed, model.dtype)
        hidden = model.base_model(**inputs, use_cache=False).last_hidden_state  # (R, S, D)
        hidden = hidden.flatten(0, 1)
    # A prompt's last token predicts the first of every completion. The gradient of hidden[predictors] adds those with atomics, in
    # float32 in an order that differs from run to run; that of index_select adds them in theirs.
    hidden = hidden.index_select(0, predictors)  # (N, D), N sampled tokens, row after row
    targets = sequence_ids[batch.rows, 1 : batch.width + 1][mask]  # (N,)
    head = model.get_output_embeddings()
    log_probs = torch.zeros(mask.shape, dtype=torch.float32, device=hidden.device)
    return log_probs.masked_scatter(mask, _TokenLogProbs.apply(hidden, head.weight, head.bias, targets, temperature))


def head_product(weight: torch.Tensor, bias: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """The output head, weight (V, D) and bias (V,) or None, as a function from hidden states (n, D) to logits (n, V) float32.

    A bfloat16 product rounds its result: logits of 20 by 0.06, half of the log-probs' error. On a CPU without matrix units of our
    own the factors are given in float32 and multiplied as the bfloat16 that they are, with a result in float32.
    """
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return lambda hidden: F.linear(hidden, weight, bias).float()
    if kernels.PackedWeight.fits(weight):
        packed = kernels.PackedWeight(weight, bias)
        return lambda hidden: packed(hidden, torch.float32)
    wide, wide_bias = weight.float(), None if bias is None else bias.float()
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # torch puts an object in the module's place

    def of(hidden: torch.Tensor) -> torch.Tensor:
        before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
        try:
            return F.linear(hidden.float(), wide, wide_bias)
        finally:
            matmul.fp32_precision = before

    return of


def vocabulary_block(device: str) -> int:
    """Logits of a token that exist at once on a kind of device; where each kernel has to be launched, more."""
    return VOCABULARY_BLOCK if device == "cpu" else 8 * VOCABULARY_BLOCK


class LogTotals:
    """Log of the sum of exponentials of logits that come a block at a time, and the targets' logits, at a temperature."""

    def __init__(self, targets: torch.Tensor, temperature: float):
        self.targets, self.temperature = targets, temperature
        self.sums = torch.full(targets.shape, -torch.inf, device=targets.device)  # logsumexp of the logits so far
        self.of_target = torch.empty_like(self.sums)

    def take(self, logits: torch.Tensor, start: int) -> None:
        """Logits (n, v) float32 of the entries from `start` on; changed in place."""
        logits.div_(self.temperature)
        self.sums = torch.logaddexp(self.sums, logits.logsumexp(dim=1))
        here = ((self.targets >= start) & (self.targets < start + logits.shape[1])).nonzero()[:, 0]
        self.of_target[here] = logits[here, self.targets[here] - start]

    def totals(self) -> torch.Tensor:
        return self.sums


class _TokenLogProbs(torch.autograd.Function):
    """log_softmax((hidden W^T + b) / temperature) at the targets, a block of the vocabulary at a time.

    The gradient of the log-prob of target y in the logits is (onehot(y) - softmax) / temperature; written out, it is made in
    place of a block's logits, where autograd would keep and walk several tensors of the size of all.
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
        seen = kernels.LogTotals(targets, temperature) if compiled else LogTotals(targets, temperature)
        for part in _vocabulary_blocks(weight):
            seen.take(head_product(weight[part], None if bias is None else bias[part])(hidden), part.start)
        totals = seen.totals()
        ctx.save_for_backward(hidden, weight, bias, targets, totals)
        ctx.temperature, ctx.compiled = temperature, compiled and hidden.dtype in (torch.float32, torch.bfloat16)
        return seen.of_target - totals

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, targets, totals = ctx.saved_tensors
        dtype, incoming, grad = hidden.dtype, grad.contiguous(), grad[:, None] / ctx.temperature  # (N, 1)
        grad_hidden = weight[targets] * grad  # (N, D) float32; what the targets' onehot adds, then the softmax
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        grad_bias = torch.empty_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        for part in _vocabulary_blocks(weight):
            logits = F.linear(hidden, weight[part], None if bias is None else bias[part])  # rounded, as the gradient will be
            if ctx.compiled:
                kernels.logits_backward_(logits, ctx.temperature, totals, incoming)
                of_logits = logits  # (N, v)
            else:
                of_logits = logits.float().div_(ctx.temperature).sub_(totals[:, None]).exp_().mul_(-grad).to(dtype)
            grad_hidden += of_logits @ weight[part]
            if grad_weight is not None:
                torch.mm(of_logits.T, hidden, out=grad_weight[part])
            if grad_bias is not None:
                torch.sum(of_logits, dim=0, out=grad_bias[part])
        if grad_weight is not None:
            grad_weight.index_add_(0, targets, (hidden * grad).to(dtype))
        if grad_bias is not None:
            grad_bias.index_add_(0, targets, grad[:, 0].to(dtype))
        return grad_hidden.to(dtype), grad_weight, grad_bias, None, None


def _vocabulary_blocks(weight: torch.Tensor) -> list[slice]:
    size = vocabulary_block(weight.device.type)
    return [slice(start, min(start + size, len(weight))) for start in range(0, len(weight), size)]


def _flatten(
    sequence_ids: torch.Tensor, action_mask: torch.Tensor, packed: list[list[int]]
) -> tuple[torch.Tensor, llama.Layout, torch.Tensor]:
    """All prompts, then all completions, without padding, for `llama.packed_hidden`.

    Returns:
        Token ids (n,), their layout, and for each sampled token (N,) the place of the token before it.
    """
    ids, prompt_lengths, completions = [], [], []
    for members in packed:
        sequences, sampled = sequence_ids[members].tolist(), action_mask[members].tolist()
        start = sampled[0].index(True) + 1  # tokens of the prompt
        ids += sequences[0][:start]
        prompt_lengths.append(start)
        # A completion's last token predicts nothing.
        completions.append([s[start : start + sum(row) - 1] for s, row in zip(sequences, sampled, strict=True)])
    predictors, last = [], -1
    for length, own in zip(prompt_lengths, completions, strict=True):
        last += length  # a prompt's last token predicts the first of every completion
        for completion in own:
            predictors += [last, *range(len(ids), len(ids) + len(completion))]
            ids += completion
    layout = llama.Layout.of(prompt_lengths, [[len(c) for c in own] for own in completions])
    return torch.tensor(ids), layout, torch.tensor(predictors)


def _pack(
    sequence_ids: torch.Tensor, action_mask: torch.Tensor, packed: list[list[int]], dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Lay R packed rows out for a forward pass.

    Returns:
        The model's inputs, (R, S) each, the attention mask (R, S) where every row holds one completion and otherwise
        (R, 1, S, S); and, for each sampled token (N,), where in the flattened (R x S) the token before it stands.
    """
    device = sequence_ids.device
    rows = [row for members in packed for row in members]  # of this pass alone, not of the whole batch
    ids_of = dict(zip(rows, sequence_ids[rows].tolist(), strict=True))
    mask_of = dict(zip(rows, action_mask[rows].tolist(), strict=True))
    ids, positions, segments, predictors = [], [], [], []  # of each packed row; a segment is 0 in the prompt, then 1, 2, ...
    for members in packed:
        start = mask_of[members[0]].index(True) + 1  # tokens of the prompt
        row_ids, row_positions, row_segments, row_predictors = ids_of[members[0]][:start], list(range(start)), [0] * start, []
        for segment, member in enumerate(members, start=1):
            count = sum(mask_of[member])
            # The first token is predicted from the prompt's last, the others each from the one before it; the last
            # predicts nothing, and stays out.
            row_predictors += [start - 1, *range(len(row_ids), len(row_ids) + count - 1)]
            row_ids += ids_of[member][start : start + count - 1]
            row_positions += range(start, start + count - 1)
            row_segments += [segment] * (count - 1)
        ids.append(row_ids)
        positions.append(row_positions)
        segments.append(row_segments)
        predictors.append(row_predictors)
    longest = max(map(len, ids))
    pad = lambda rows, fill: torch.tensor([r + [fill] * (longest - len(r)) for r in rows], device=device)  # noqa: E731
    flat = [row * longest + p for row, row_predictors in enumerate(predictors) for p in row_predictors]
    inputs = {"input_ids": pad(ids, 0), "position_ids": pad(positions, 0)}
    of_segment = pad(segments, -1)  # (R, S)
    if all(len(members) == 1 for members in packed):
        inputs["attention_mask"] = (of_segment >= 0).long()
    else:
        own = of_segment[:, :, None] == of_segment[:, None, :]  # query, key: one completion, or both in the prompt, or padding
        allowed = (own | (of_segment[:, None, :] == 0)).tril()  # (R, S, S); a token sees itself, padding too: no row is empty
        # Added to the scores, which every attention implementation understands.
        blocked = torch.finfo(dtype).min
        inputs["attention_mask"] = torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill(~allowed, blocked)[:, None]
    return inputs, torch.tensor(flat, dtype=torch.long, device=device)
