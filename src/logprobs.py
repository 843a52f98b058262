"""Log-probabilities of given completions under a model: one function for the current policy and for the reference.

Logits exist for completion tokens only, `CHUNK_TOKENS` of them at a time, and are computed again in the backward pass: a
batch's full logits would be larger than the embedded model itself.
"""

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

PASS_COST = 64  # what one more forward and backward pass costs, in tokens of a pass
CHUNK_TOKENS = 256  # at a vocabulary of 49,152, 50 MB of float32 logits


def completion_log_probs(
    model: PreTrainedModel,
    sequence_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    action_mask: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """Log-probability of every sampled token of B sequences, under the tempered distribution that they were sampled from.

    Args:
        model: A causal language model; see `models.check_head` for what its output head may do.
        sequence_ids: (B, T) int64, prompt + completion, padded on the right.
        attention_mask: (B, T), true for real tokens.
        action_mask: (B, T-1) bool, true where token t + 1 was sampled by the policy.
        temperature: Above 0; the logits are divided by it before the softmax.

    Returns:
        (B, T-1) float32, nats, 0 outside the mask; differentiable in the model's weights where they require grad.
    """
    assert sequence_ids.shape == attention_mask.shape and action_mask.shape == sequence_ids[:, 1:].shape
    # The last position predicts a token beyond T: dropped, hence T-1. Padding on the right needs no position ids.
    hidden = model.base_model(sequence_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state[:, :-1]
    hidden = hidden[action_mask]  # (N, D), N sampled tokens
    targets = sequence_ids[:, 1:][action_mask]  # (N,)
    head = model.get_output_embeddings()

    def chunk_log_probs(hidden_chunk: torch.Tensor, target_chunk: torch.Tensor) -> torch.Tensor:
        logits = head(hidden_chunk).float() / temperature  # (n, V)
        return logits.gather(1, target_chunk[:, None])[:, 0] - logits.logsumexp(dim=1)  # (n,)

    chunks = [
        checkpoint(chunk_log_probs, h, t, use_reentrant=False)
        for h, t in zip(hidden.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True)
    ]
    log_probs = torch.zeros(action_mask.shape, dtype=torch.float32, device=hidden.device)
    return log_probs.masked_scatter(action_mask, torch.cat(chunks)) if chunks else log_probs


def micro_batches(attention_mask: torch.Tensor, rows: torch.Tensor, size: int) -> list[tuple[torch.Tensor, int]]:
    """Split rows into passes of at most `size` completions, so that padding and passes together cost least.

    Rows are sorted by length; the best cuts are found by dynamic programming. A pass costs its rows x its longest row, in
    tokens, and PASS_COST more: one long completion among seven short ones goes alone.

    Args:
        attention_mask: (B, T), true for real tokens.
        rows: (n,) int64 on the CPU, the rows to split.
        size: Rows of a pass at most.

    Returns:
        The rows of each pass, and how many predictions (columns of a (B, T-1) tensor) its longest row has.
    """
    lengths = attention_mask.sum(dim=1).cpu()[rows]
    rows, lengths = rows[lengths.argsort(stable=True)], lengths.sort().values.tolist()
    best: list[tuple[float, int]] = [(0.0, 0)]  # cost of the first i rows, and where their last pass begins
    for i in range(1, len(rows) + 1):
        best.append(min((best[j][0] + (i - j) * lengths[i - 1] + PASS_COST, j) for j in range(max(0, i - size), i)))
    passes, end = [], len(rows)
    while end:
        start = best[end][1]
        passes.append((rows[start:end], lengths[end - 1] - 1))
        end = start
    return passes[::-1]
