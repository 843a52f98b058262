"""The output head: log-probs of given tokens, one block of the vocabulary at a time, and their gradient."""

from operator import itemgetter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from src.engine import kernels
from src.engine.fused import fused
from src.engine.linear import make_head, make_linear, map_bias

VOCABULARY_BLOCK = 1024  # logits per token at a time on a CPU, so that 2,000 tokens fit in its cache
# Bytes of float32 logits that a pass on a CPU keeps for its gradient; it computes the rest again, which takes
# 7% of the update's time. In bfloat16, everything is computed again: matrix units make that cheap.
KEPT_LOGITS = 2**29


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
        """Add logits (n, v) float32 of the vocabulary entries starting at `start`."""
        column, here = find_in_block(self.targets, start, logits.shape[1])
        total, target_logits = sum_block(logits, column[:, None], self.temperature)
        self.log_sum_exp = torch.logaddexp(self.log_sum_exp, total)
        self.target_logits = torch.where(here, target_logits, self.target_logits)

    def value(self) -> torch.Tensor:
        """The log-sum-exp (n,) float32 of all logits so far."""
        return self.log_sum_exp


@fused
def sum_block(
    logits: torch.Tensor, column: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-sum-exp (n,) of tempered logits (n, v), and those in the columns (n, 1), as (n,)."""
    return (logits / temperature).logsumexp(dim=1), logits.gather(1, column)[:, 0] / temperature


@fused
def logits_gradient(
    logits: torch.Tensor,
    log_sum_exp: torch.Tensor,
    column: torch.Tensor,
    d_target: torch.Tensor,
    temperature: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The gradient of the targets' log-probs with respect to a block's logits, (n, v) in `dtype`.

    Args:
        logits: (n, v) float32.
        log_sum_exp: (n, 1) float32, of all tempered logits.
        column: (n, 1) int64, the target's column in this block, or v if it is in another.
        d_target: (n, 1) float32, the gradient of the target's logit.
    """
    probs = (logits / temperature - log_sum_exp).exp()
    is_target = torch.arange(logits.shape[1], device=logits.device) == column
    return torch.where(is_target, d_target - probs * d_target, -probs * d_target).to(dtype)


def find_in_block(targets: torch.Tensor, start: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns (n,) of targets (n,) in a vocabulary block, 0 if outside; and whether they are in it."""
    here = (targets >= start) & (targets < start + size)
    return torch.where(here, targets - start, 0), here


class TokenLogProbs(torch.autograd.Function):
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
        compiled = hidden.device.type == "cpu" and kernels.are_compiled()
        log_sum_exp = (kernels.CompiledLogSumExp if compiled else LogSumExp)(targets, temperature)
        keep = compiled and hidden.dtype == torch.float32 and any(ctx.needs_input_grad)
        room = KEPT_LOGITS if keep else 0
        ctx.kept = {}  # the first blocks' logits (N, v), by where the block starts
        for block in _vocabulary_blocks(weight, bias):
            logits = make_head(block.weight, block.bias)(hidden)
            log_sum_exp.add(logits, block.entries.start)
            if (room := room - logits.nbytes) >= 0:
                ctx.kept[block.entries.start] = logits
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
        if hidden.device.type != "cpu":
            return _gradients_on_gpu(ctx, d_target)
        d_hidden = weight[targets] * d_target  # (N, D) float32
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        d_bias = torch.empty_like(bias) if ctx.needs_input_grad[2] else None
        for block in _vocabulary_blocks(weight, bias):
            logits = ctx.kept.pop(block.entries.start, None)  # popped, so that they are freed after use
            if logits is None:
                logits = F.linear(hidden, block.weight, block.bias)  # (N, v), rounded like their gradient
            if ctx.compiled:
                kernels.logits_backward_(logits, ctx.temperature, log_sum_exp, d_log_probs)
                d_logits = logits
            else:
                logits = logits.float().div_(ctx.temperature).sub_(log_sum_exp[:, None])  # now log-probs
                d_logits = logits.exp_().mul_(-d_target).to(dtype)
            d_hidden += make_linear(block.weight.T)(d_logits)
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
    """The gradients of `TokenLogProbs`, with the targets' part inside the products.

    Added to the weight's gradient afterwards, that part would be rounded once per token, in an order that
    differs from run to run.

    Args:
        d_target: (N, 1) float32, the gradient of each target's logit.
    """
    hidden, weight, bias, targets, log_sum_exp = ctx.saved_tensors
    d_hidden = torch.zeros(hidden.shape, device=hidden.device)  # (N, D) float32
    d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
    d_bias = torch.empty_like(bias) if ctx.needs_input_grad[2] else None
    for block in _vocabulary_blocks(weight, bias):
        logits = make_head(block.weight, block.bias)(hidden)  # (N, v)
        column, here = find_in_block(targets, block.entries.start, len(block.weight))
        column = torch.where(here, column, len(block.weight))
        given = (log_sum_exp[:, None], column[:, None], d_target, ctx.temperature, hidden.dtype)
        d_logits = logits_gradient(logits, *given)
        d_hidden += d_logits @ block.weight
        if d_weight is not None:
            torch.mm(d_logits.T, hidden, out=d_weight[block.entries])
        if d_bias is not None:
            torch.sum(d_logits, dim=0, out=d_bias[block.entries])
    return d_hidden.to(hidden.dtype), d_weight, d_bias, None, None


class _VocabularyBlock(NamedTuple):
    entries: slice  # v vocabulary entries
    weight: torch.Tensor  # (v, D)
    bias: torch.Tensor | None  # (v,)


def _vocabulary_blocks(weight: torch.Tensor, bias: torch.Tensor | None) -> list[_VocabularyBlock]:
    size = vocabulary_block(weight.device.type)
    if weight.device.type != "cpu":  # blocks of the same size, so that one compiled kernel serves all of them
        size = -(-len(weight) // -(-len(weight) // size))
    parts = [slice(start, min(start + size, len(weight))) for start in range(0, len(weight), size)]
    return [_VocabularyBlock(p, weight[p], map_bias(itemgetter(p), bias)) for p in parts]
