"""Sample completions, and record the log-probability of every sampled token.

Sampling uses the policy itself, with the same weights and kernels as training. Each prompt is read once, and
its group shares its key-value cache. All completions of the step are then decoded in one batch, and finished
ones are dropped from it.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from src import console
from src.engine import kernels, llama, static_decoder
from src.engine.decoder import Decoder, LlamaDecoder
from src.engine.fused import fused
from src.engine.general_decoder import GeneralDecoder

# Rebuild the batch once the share of unfinished rows falls below this. Rebuilding earlier would not pay,
# because each rebuild copies the cache.
COMPACT_BELOW = 0.9
CDF_BLOCK = 256  # vocabulary entries in a block of `choose`


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled, and where they end."""

    temperature: float  # divides the logits; 0 picks the most likely token, with log-probs at temperature 1
    top_p: float  # sample from the smallest set of tokens whose probabilities sum to at least this
    max_length: int  # maximum number of tokens in prompt + completion
    max_new_tokens: int | None  # the same for the completion; if None, only max_length applies
    stop_ids: list[int]  # tokens that end a completion; sampled, recorded and trained on like any other

    @property
    def pad_id(self) -> int:
        """The token that fills the end of a row. Any would do, because every mask is made from positions."""
        return self.stop_ids[0] if self.stop_ids else 0

    def greedy(self) -> Sampling:
        """The same limits, but always the most likely token."""
        return replace(self, temperature=0.0, top_p=1.0)


@dataclass(frozen=True)
class Samples:
    """B completions, group_size consecutive ones per prompt. T is the length of the longest sequence."""

    sequence_ids: torch.Tensor  # (B, T) int64, prompt + completion, padded on the right
    attention_mask: torch.Tensor  # (B, T) bool, true for real tokens
    action_mask: torch.Tensor  # (B, T-1) bool, true if token t + 1 was sampled, as stop tokens are
    log_probs: torch.Tensor  # (B, T-1) float32, nats, under the tempered distribution; 0 outside the mask
    finished: torch.Tensor  # (B,) bool, true if a stop token ended it; otherwise a length limit truncated it
    group_size: int  # G

    @property
    def host(self) -> Samples:
        """The samples in host memory, so that making lists of tokens does not wait for a GPU each time."""
        return self if self.sequence_ids.device.type == "cpu" else self._copy_on_host

    @functools.cached_property
    def _copy_on_host(self) -> Samples:
        return self.to(torch.device("cpu"))

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens of each completion (B,), including the stop token."""
        return self.action_mask.sum(dim=1)

    def completion_ids(self) -> list[list[int]]:
        """Token ids of each completion, including the stop token."""
        flat = self.sequence_ids[:, 1:][self.action_mask].cpu()
        return [ids.tolist() for ids in flat.split(self.lengths.tolist())]

    def to(self, device: torch.device) -> Samples:
        """The same samples on another device."""
        moved: dict[str, Any] = {
            k: v.to(device) for k, v in vars(self).items() if isinstance(v, torch.Tensor)
        }
        return replace(self, **moved)


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompt_ids: list[list[int]],
    group_size: int,
    sampling: Sampling,
    generator: torch.Generator | None,
    part_of: tuple[int, int] | None = None,
) -> Samples:
    """Sample `group_size` completions of each prompt.

    With top_p < 1, the recorded log-prob is still the one under the full tempered distribution, which is what
    training computes too.

    Args:
        prompt_ids: Q lists of token ids, each with at least one token and shorter than `max_length`.
        group_size: G.
        sampling: How to draw, and when to stop.
        generator: A random generator on the model's device, which may be None only if the temperature is 0.
            Each step draws one number per row, finished or not, so a completion does not depend on when
            others end.
        part_of: If these completions are part of a larger batch, the index of the first one in it, and the
            size of the larger batch. They then draw the same numbers as they would in the larger batch.

    Returns:
        `Samples`, on the model's device.
    """
    device = model.device
    lengths = torch.tensor([len(ids) for ids in prompt_ids], device=device)  # (Q,)
    prompt_lengths = lengths.repeat_interleave(group_size)  # (B,)
    limits = sampling.max_length - prompt_lengths  # (B,) maximum number of tokens in each completion
    if sampling.max_new_tokens is not None:
        limits = limits.clamp(max=sampling.max_new_tokens)
    batch, steps = len(limits), int(limits.max())
    first, whole = part_of or (0, batch)
    console.detail(f"reading {len(prompt_ids)} prompts")
    decoder = make_decoder(model, batch, int(prompt_lengths.max()) + steps)
    logits = decoder.prefill(prompt_ids, group_size, sampling.pad_id)  # (B, V)
    partial = _PartialCompletions(limits, sampling)
    greedy = sampling.temperature == 0
    for step in range(steps):
        uniform = None
        if not greedy:  # one number per row of the larger batch; the n rows left here use theirs
            uniform = torch.rand(whole, device=device, generator=generator)[first + partial.rows]
        token, log_prob = _pick(logits, sampling.temperature, sampling.top_p, uniform)  # (n,) each
        partial.append(step, token, log_prob)
        if (step + 1) % decoder.check_every == 0:
            unfinished = int(partial.unfinished.sum())
            console.detail(f"{unfinished} left, {step + 1} tokens")
            if unfinished == 0:
                break
            if decoder.can_drop_rows and unfinished < COMPACT_BELOW * len(partial.rows):
                keep = partial.unfinished.nonzero()[:, 0]
                decoder.keep(keep)
                partial.keep(keep)
                token = token[keep]
        if step + 1 == steps:
            break
        logits = decoder.step(token)  # (n, V)
    return partial.join_prompts(prompt_ids, group_size)


def make_decoder(model: PreTrainedModel, rows: int, columns: int) -> Decoder:
    """The fastest decoder that supports the model, for `rows` sequences of at most `columns` tokens."""
    if llama.is_supported(model):
        return LlamaDecoder(model, rows, columns)
    if static_decoder.can_compile(model):
        return static_decoder.static_decoder(model, rows, columns)
    return GeneralDecoder(model)


def reserve(model: PreTrainedModel, rows: int, columns: int) -> None:
    """Make a decoder that is large enough for all batches of a run, if it is one that is kept (on a GPU).

    Otherwise, a small first batch would compile a decoder that is soon replaced. That can take half a minute.
    """
    if not llama.is_supported(model) and static_decoder.can_compile(model):
        with contextlib.suppress(torch.OutOfMemoryError):  # the first rollout will try smaller batches
            static_decoder.static_decoder(model, rows, columns)


def decode(tokenizer: PreTrainedTokenizerBase, samples: Samples) -> list[str]:
    """Text of each of the B completions, without the stop token at its end and without padding tokens.

    Other special tokens stay: in some models, <answer> is one.
    """
    ends = [-1 if finished else None for finished in samples.finished.tolist()]
    kept = [
        [i for i in ids[:end] if i != tokenizer.pad_token_id]
        for ids, end in zip(samples.completion_ids(), ends, strict=True)
    ]
    return tokenizer.batch_decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _pick(
    logits: torch.Tensor, temperature: float, top_p: float, uniform: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pick one token per row of logits (n, V), and return the tokens and their log-probs, (n,) each.

    Inverse-CDF sampling needs one random number per row. torch.multinomial draws one per vocabulary entry,
    which took a quarter of the sampling time on a CPU.

    Args:
        uniform: (n,) points at which to invert the CDF. If None, pick the most likely token.
    """
    if uniform is None:
        token = logits.argmax(dim=-1, keepdim=True)  # (n, 1)
        return token[:, 0], logits.float().log_softmax(dim=-1).gather(1, token)[:, 0]
    on_cpu = logits.device.type == "cpu" and logits.dtype == torch.float32
    if top_p == 1.0 and on_cpu and kernels.are_compiled():
        return kernels.choose(logits, temperature, uniform)
    if top_p == 1.0 and logits.device.type == "cuda":
        return choose(logits, uniform, temperature)
    probs = (logits.float() / temperature).softmax(dim=-1)  # (n, V)
    kept = probs
    if top_p < 1.0:
        ordered, order = probs.sort(dim=-1, descending=True)
        beyond = ordered.cumsum(dim=-1) - ordered >= top_p  # the mass before a token already suffices
        kept = torch.zeros_like(probs).scatter(-1, order, ordered.masked_fill(beyond, 0.0))
    # A GPU adds partial sums in the order of a tree. In float32, the CDF could then decrease in places, and
    # improbable tokens would be drawn.
    cdf = kept.cumsum(dim=-1, dtype=torch.float64 if kept.device.type == "cuda" else None)
    # The factor keeps the point below the total even after rounding, so the entry found has a nonzero
    # probability.
    point = uniform[:, None] * cdf[:, -1:] * (1 - 2**-23)
    token = torch.searchsorted(cdf, point, right=True)  # (n, 1)
    return token[:, 0], probs.gather(1, token).log()[:, 0]


@fused
def choose(
    logits: torch.Tensor, uniform: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample one token per row of logits (n, V) at a temperature, by inverse CDF, for a GPU.

    The CDF is inverted in two levels, first over blocks of the vocabulary and then within one block. Only the
    block sums and one block's entries are summed up in float64, in which no entry gets lost in rounding.

    Args:
        uniform: (n,) float32, one random number in [0, 1) per row.

    Returns:
        The tokens (n,) int64, and their log-probs (n,) float32.
    """
    log_probs = (logits / temperature).log_softmax(dim=-1)
    missing = -logits.shape[1] % CDF_BLOCK
    blocks = torch.nn.functional.pad(log_probs.exp(), (0, missing)).unflatten(1, (-1, CDF_BLOCK))
    sums = blocks.sum(dim=2, dtype=torch.float64)  # (n, blocks)
    cdf = sums.cumsum(dim=1)
    point = uniform.double() * cdf[:, -1]  # (n,)
    block = (cdf <= point[:, None]).sum(dim=1)  # the first one that ends beyond the point
    before = torch.where(block > 0, cdf.gather(1, (block - 1).clamp(min=0)[:, None])[:, 0], 0.0)
    inside = blocks.gather(1, block[:, None, None].expand(-1, 1, CDF_BLOCK))[:, 0].double().cumsum(dim=1)
    # Even after rounding, the point stays below the end of the block, so the entry has a nonzero probability.
    rest = torch.minimum(point - before, inside[:, -1] * (1 - 2**-40))
    token = block * CDF_BLOCK + (inside <= rest[:, None]).sum(dim=1)
    return token, log_probs.gather(1, token[:, None])[:, 0]


class _PartialCompletions:
    """B growing completions of up to C tokens each, of which n are still in the decode batch.

    Args:
        limits: (B,) int64, the maximum number of tokens in each completion.
    """

    def __init__(self, limits: torch.Tensor, sampling: Sampling):
        batch, longest, device = len(limits), int(limits.max()), limits.device
        self.limits, self.pad_id = limits, sampling.pad_id
        self.stops = torch.tensor(sampling.stop_ids, device=device)
        self.tokens = torch.full((batch, longest), self.pad_id, device=device)  # (B, C)
        self.log_probs = torch.zeros(batch, longest, device=device)  # (B, C)
        self.counts = torch.zeros(batch, dtype=torch.long, device=device)  # (B,) tokens of each completion
        self.finished = torch.zeros(batch, dtype=torch.bool, device=device)  # (B,)
        self.rows = torch.arange(batch, device=device)  # (n,) the completion of each row of the decode batch
        self.unfinished = torch.ones(batch, dtype=torch.bool, device=device)  # (n,)

    def append(self, step: int, token: torch.Tensor, log_prob: torch.Tensor) -> None:
        """Append a token and its log-prob, (n,) each, to the unfinished completions. `step` counts from 0."""
        self.tokens[self.rows, step] = torch.where(self.unfinished, token, self.pad_id)
        self.log_probs[self.rows, step] = torch.where(self.unfinished, log_prob, 0.0)
        self.counts[self.rows] += self.unfinished
        stopped = torch.isin(token, self.stops)
        self.finished[self.rows] |= self.unfinished & stopped
        self.unfinished = self.unfinished & ~stopped & (self.limits[self.rows] > step + 1)

    def keep(self, rows: torch.Tensor) -> None:
        """Keep only these rows, as `Decoder.keep` does."""
        self.rows, self.unfinished = self.rows[rows], self.unfinished[rows]

    def join_prompts(self, prompt_ids: list[list[int]], group_size: int) -> Samples:
        """Put each completion directly after its prompt."""
        device = self.tokens.device
        prompts = [torch.tensor(ids) for ids in prompt_ids for _ in range(group_size)]  # B
        starts = torch.tensor([[len(ids)] for ids in prompts], device=device)  # (B, 1)
        ends = starts + self.counts[:, None]
        column = torch.arange(int(ends.max()), device=device)  # (T,)
        completion = (column >= starts) & (column < ends)  # (B, T)
        at = (column - starts).clamp(0, self.tokens.shape[1] - 1)  # (B, T), in `tokens`
        padded = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True).to(device)  # (B, P)
        prompt = padded[:, column.clamp(max=padded.shape[1] - 1)]  # (B, T)
        # Not by boolean masks, for each of which the host would wait for a GPU.
        sequence_ids = torch.where(completion, self.tokens.gather(1, at), self.pad_id)
        log_probs = torch.where(completion, self.log_probs.gather(1, at), 0.0)
        return Samples(
            sequence_ids=torch.where(column < starts, prompt, sequence_ids),
            attention_mask=column < ends,
            action_mask=completion[:, 1:],  # one column shorter: entry t is about predicting token t + 1
            log_probs=log_probs[:, 1:].contiguous(),
            finished=self.finished,
            group_size=group_size,
        )
