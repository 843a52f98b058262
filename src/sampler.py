"""Many completions for many prompts, with the log-probability of every sampled token.

The sampler is the policy itself, same weights and kernels: each prompt is read once and its key-value cache shared by
its group, then all completions of the step decode in one batch, which finished ones leave.
"""

from dataclasses import dataclass
from typing import TypedDict

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from src import kernels
from src.decoder import make_decoder

COMPACT_BELOW = 0.9  # rebuild the batch once this share of its rows is still going: a rebuild copies the cache


@dataclass
class Samples:
    """B = prompts x group_size completions, those of a prompt side by side. T is the longest prompt + completion."""

    sequence_ids: torch.Tensor  # (B, T) int64, prompt + completion, padded on the right
    attention_mask: torch.Tensor  # (B, T) bool, real tokens
    action_mask: torch.Tensor  # (B, T-1) bool, token t + 1 was sampled by the policy; the stop token is
    log_probs: torch.Tensor  # (B, T-1) float32, nats, under the tempered distribution; 0 outside the mask
    finished: torch.Tensor  # (B,) bool, ended with a stop token; otherwise cut off by a length limit
    completion_ids: list[list[int]]  # B, stop token included


class Limits(TypedDict):
    """Where completions end; see `sample`."""

    max_length: int
    max_new_tokens: int | None
    stop_ids: list[int]
    pad_id: int


class Sampling(Limits):
    """Where completions end, and what they are drawn from; see `sample`."""

    temperature: float
    top_p: float


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompt_ids: list[list[int]],
    group_size: int,
    *,
    max_length: int,
    max_new_tokens: int | None,
    temperature: float,
    top_p: float,
    stop_ids: list[int],
    pad_id: int,
    generator: torch.Generator | None,
    part_of: tuple[int, int] | None = None,
) -> Samples:
    """Sample `group_size` completions of each prompt.

    Args:
        prompt_ids: Q lists of token ids, each at least one token and shorter than `max_length`.
        group_size: G.
        max_length: Tokens of prompt + completion at most.
        max_new_tokens: Tokens of a completion at most; None = `max_length` alone decides.
        temperature: Logits are divided by it. 0 takes the likeliest token (log-probs are then those at temperature 1).
        top_p: Sample from the smallest set of tokens whose probabilities sum to this. The recorded log-prob stays that
            of the whole tempered distribution, which is the one that training computes.
        stop_ids: Tokens that end a completion. They are sampled, recorded and trained like any other.
        pad_id: Fills what is not a token; every mask comes from positions, so it may equal a stop token.
        generator: On the model's device. Each step draws one number per row, finished or not, so that a completion does
            not depend on when others ended. None only where temperature is 0.
        part_of: Where these completions are a part of a larger batch, the first one's row there and the rows of the whole: they
            then draw what they would draw there.

    Returns:
        `Samples`, on the model's device.
    """
    device = model.device
    prompt_lengths = torch.tensor([len(ids) for ids in prompt_ids], device=device).repeat_interleave(group_size)  # (B,)
    limits = max_length - prompt_lengths  # (B,) tokens that a completion may have
    if max_new_tokens is not None:
        limits = limits.clamp(max=max_new_tokens)
    batch, steps = len(limits), int(limits.max())
    first, whole = part_of or (0, batch)
    decoder = make_decoder(model, batch, int(prompt_lengths.max()) + steps)
    logits = decoder.prefill(prompt_ids, group_size, pad_id)  # (B, V)
    growing = _Growing(limits, stop_ids, pad_id)
    for step in range(steps):
        uniform = None if temperature == 0 else torch.rand(whole, device=device, generator=generator)[first + growing.rows]
        token, log_prob = _pick(logits, temperature, top_p, uniform)
        growing.take(step, token, log_prob)
        if (step + 1) % decoder.look_every == 0:
            if (left := int(growing.going.sum())) == 0:
                break
            if decoder.shrinks and left < COMPACT_BELOW * len(growing.rows):
                keep = growing.going.nonzero()[:, 0]
                decoder.keep(keep)
                growing.keep(keep)
                token = token[keep]
        if step + 1 == steps:
            break
        logits = decoder.step(token)
    return growing.behind(prompt_ids, group_size)


def decode(tokenizer: PreTrainedTokenizerBase, samples: Samples) -> list[str]:
    """Text of each completion, without special tokens."""
    return tokenizer.batch_decode(samples.completion_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _pick(
    logits: torch.Tensor, temperature: float, top_p: float, uniform: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token per row of logits (n, V) and its log-prob: inverse CDF at `uniform` (n,), or the likeliest at temperature 0.

    Inverse-CDF sampling needs one random number a row; torch.multinomial draws one per vocabulary entry, which took a
    quarter of the time of generation on a CPU.
    """
    if uniform is None:
        token = logits.argmax(dim=-1, keepdim=True)  # (n, 1)
        return token[:, 0], logits.float().log_softmax(dim=-1).gather(1, token)[:, 0]
    if top_p == 1.0 and logits.device.type == "cpu" and logits.dtype == torch.float32 and kernels.libraries() is not None:
        return kernels.choose(logits, temperature, uniform)
    probs = (logits.float() / temperature).softmax(dim=-1)  # (n, V)
    kept = probs
    if top_p < 1.0:
        ordered, order = probs.sort(dim=-1, descending=True)
        beyond = ordered.cumsum(dim=-1) - ordered >= top_p  # the mass before a token already suffices
        kept = torch.zeros_like(probs).scatter(-1, order, ordered.masked_fill(beyond, 0.0))
    cdf = kept.cumsum(dim=-1)
    # Held below the total where rounding would reach it: the first entry above the point then has a probability.
    point = uniform[:, None] * cdf[:, -1:] * (1 - 2**-23)
    token = torch.searchsorted(cdf, point, right=True)  # (n, 1)
    return token[:, 0], probs.gather(1, token).log()[:, 0]


class _Growing:
    """B completions while they grow, the longest to C tokens, and which of them the n rows of the decode batch belong to.

    Args:
        limits: (B,) int64, tokens that each may have.
        stop_ids, pad_id: As `sample` takes them.
    """

    def __init__(self, limits: torch.Tensor, stop_ids: list[int], pad_id: int):
        batch, longest, device = len(limits), int(limits.max()), limits.device
        self.limits, self.pad_id = limits, pad_id
        self.stops = torch.tensor(stop_ids, device=device)
        self.tokens = torch.full((batch, longest), pad_id, device=device)  # (B, C)
        self.log_probs = torch.zeros(batch, longest, device=device)  # (B, C)
        self.counts = torch.zeros(batch, dtype=torch.long, device=device)  # (B,) tokens of each completion
        self.finished = torch.zeros(batch, dtype=torch.bool, device=device)  # (B,)
        self.rows = torch.arange(batch, device=device)  # (n,) the completion that each row of the decode batch belongs to
        self.going = torch.ones(batch, dtype=torch.bool, device=device)  # (n,)

    def take(self, step: int, token: torch.Tensor, log_prob: torch.Tensor) -> None:
        """Add to those still going their token number `step`, counted from 0, with its log-prob: (n,) each."""
        self.tokens[self.rows, step] = torch.where(self.going, token, self.pad_id)
        self.log_probs[self.rows, step] = torch.where(self.going, log_prob, 0.0)
        self.counts[self.rows] += self.going
        stopped = torch.isin(token, self.stops)
        self.finished[self.rows] |= self.going & stopped
        self.going = self.going & ~stopped & (self.limits[self.rows] > step + 1)

    def keep(self, rows: torch.Tensor) -> None:
        """Let the other rows leave, as `Decoder.keep` does."""
        self.rows, self.going = self.rows[rows], self.going[rows]

    def behind(self, prompt_ids: list[list[int]], group_size: int) -> Samples:
        """Each completion right behind its prompt."""
        device = self.tokens.device
        prompts = [ids for ids in prompt_ids for _ in range(group_size)]  # B
        completion_ids = [row[:n] for row, n in zip(self.tokens.tolist(), self.counts.tolist(), strict=True)]
        starts = torch.tensor([len(ids) for ids in prompts], device=device)  # (B,)
        ends = starts + self.counts
        length = int(ends.max())
        sequence_ids = torch.full((len(prompts), length), self.pad_id)
        for row, prompt, completion in zip(sequence_ids, prompts, completion_ids, strict=True):
            row[: len(prompt) + len(completion)] = torch.tensor(prompt + completion)
        column = torch.arange(length, device=device)
        completion = (column >= starts[:, None]) & (column < ends[:, None])  # (B, T)
        joined = torch.zeros(completion.shape, device=device)  # (B, T)
        joined[completion] = self.log_probs[torch.arange(self.tokens.shape[1], device=device) < self.counts[:, None]]
        return Samples(
            sequence_ids=sequence_ids.to(device),
            attention_mask=column < ends[:, None],
            action_mask=completion[:, 1:],  # one shorter: entry t is about predicting token t + 1
            log_probs=joined[:, 1:].contiguous(),
            finished=self.finished,
            completion_ids=completion_ids,
        )
