"""Before training, compare the log-probs of sampler and trainer with those of the model's own forward pass.

Sampling continues from a cache, and training packs several completions into a row. Neither is right for every
model: positions may not come from `position_ids`, a window may ignore the mask, a rotary embedding may depend
on the length. So this measures both on the model at hand. No list of names decides what can be trained.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import cast

import torch
from transformers import PreTrainedModel

from src.console import phase, say
from src.engine import architecture
from src.engine.logprobs import completion_log_probs, micro_batches
from src.engine.sampler import Samples, Sampling, reserve, sample
from src.errors import InputError, first_line

# A number in a configuration may be a length at which the model changes. The longest few are checked.
SHORTEST, LENGTHS = 32, 3
BEFORE, AFTER = 4, 12  # tokens before and after such a length that are sampled
GROUP = 2  # completions of each prompt
# How far the log-probs of a completion may differ, in nats: at most in float32, and on average in bfloat16,
# in which the forward passes round at different places. Faults have differed by 1 to 9 nats.
TOLERANCE = {torch.float32: 0.005, torch.bfloat16: 0.2}
SLACK = 0.02  # nats


@dataclass(frozen=True)
class Gaps:
    """How far a model's log-probs differ from its own forward pass, for each of n prompts, in nats."""

    sampler: list[float]
    trainer: list[float]
    alone: list[float]  # of the trainer, if each completion is computed by itself
    tolerance: float
    errors: dict[str, str]  # what was raised instead, by "sampling" or "training"

    @property
    def agree(self) -> bool:
        # In bfloat16, packing may not add much to the rounding that there is without it.
        rounding = max(self.sampler + self.alone)
        return rounding <= self.tolerance and max(self.trainer) <= min(self.tolerance, 3 * rounding + SLACK)

    def describe(self) -> str:
        return f"{max(self.sampler):.2g} nats in sampling and {max(self.trainer):.2g} in training"

    def explain(self) -> str:
        """Why a model cannot be trained."""
        if self.errors:
            return " and ".join(f"{what} failed ({error})" for what, error in self.errors.items())
        return (
            f"its log-probs differ from those of its own forward pass by {self.describe()} (at most "
            f"{self.tolerance} is healthy), so it would learn from wrong numbers"
        )


@phase("check the model")
def check_model(
    model: PreTrainedModel, prompts: list[tuple[int, ...]], args: SimpleNamespace, named: str | None = None
) -> None:
    """Compare sampler and trainer with the model's own forward pass. If only packing differs, never pack it.

    Args:
        model: The policy, as it will compute.
        prompts: Token ids of the problems' prompts.
        args: main()'s parameters.
        named: The flag and value that the model came from, for messages; by default --model-name.

    Raises:
        InputError: They differ even without packing.
    """
    started = time.perf_counter()
    named = named or f"--model-name {args.model_name}"
    tokens, largest = model.get_input_embeddings().num_embeddings, max(map(max, prompts))
    if largest >= cast(int, tokens):
        raise InputError(
            f"{named}: its prompts contain token {largest} of the tokenizer, but the model has only {tokens} "
            "tokens; call model.resize_token_embeddings(len(tokenizer)) and save both"
        )
    # On a GPU, this also compiles the decoder that the rollouts will use.
    columns = min(args.max_length, max(map(len, prompts)) + (args.max_new_tokens or args.max_length))
    reserve(model, args.rollouts_per_step * args.group_size, columns)
    packed = found = compare(model, prompts, args)
    if not found.agree and architecture.can_pack(model):
        architecture.forbid_packing(model)
        found = compare(model, prompts, args)
    if not found.agree:
        way_out = "use another model"
        for length in special_lengths(model, args.max_length)[::-1]:
            shorter = SimpleNamespace(**vars(args) | {"max_length": length})
            if len(prompts[0]) < length and compare(model, prompts, shorter).agree:
                way_out = f"up to {length} tokens they agree: use --max-length {length}, or another model"
                break
        raise InputError(f"{named}: {found.explain()}; {way_out}")
    seconds = f"checked in {time.perf_counter() - started:.1f} s"
    say(f"log-probs differ from the model's own forward pass by {found.describe()} ({seconds})")
    if found is not packed:
        say(f"each completion is computed in a row of its own: packed, they differ by {packed.describe()}")


@torch.no_grad()
def compare(model: PreTrainedModel, prompts: list[tuple[int, ...]], args: SimpleNamespace) -> Gaps:
    """Measure the gaps for real prompts, repeated or cut to the lengths at which the model may change."""
    lengths = [min(len(prompts[0]) + AFTER, args.max_length), *special_lengths(model, args.max_length)]
    ends = [min(length + AFTER, args.max_length) for length in lengths]
    text = [i for prompt in prompts[:8] for i in prompt] * args.max_length
    # Sampled completions start just before the length. Made-up ones start halfway, so that a packed row is
    # much longer than the length.
    near = [text[: max(1, length - BEFORE)] for length in lengths]
    sampling = Sampling(args.temperature, 1.0, max(ends), BEFORE + AFTER, [])
    generator = torch.Generator(model.device).manual_seed(0)

    def sampled() -> list[float]:
        samples = sample(model, near, GROUP, sampling, generator)
        return list(_differences(model, samples, samples.log_probs, args.temperature))

    def trained(at_once: int) -> list[float]:
        halves = [text[: max(1, length // 2)] for length in lengths]
        samples = make_up(halves, text[1:], ends).to(model.device)
        log_probs = torch.zeros_like(samples.log_probs)
        for part in micro_batches(model, samples, torch.arange(len(log_probs)), at_once):
            computed = completion_log_probs(model, samples, part, args.temperature)
            log_probs[part.rows, : part.width] = computed
        return list(_differences(model, samples, log_probs, args.temperature))

    gaps: dict[str, list[float]] = {}
    errors: dict[str, str] = {}
    packed, alone = partial(trained, GROUP * len(lengths)), partial(trained, 1)
    for what, measure in (("sampling", sampled), ("training", packed), ("training alone", alone)):
        try:
            gaps[what] = measure()
        except Exception as error:  # models made elsewhere can raise anything
            gaps[what] = [float("inf")] * len(ends)
            errors[what] = first_line(error)
    measured = gaps["sampling"], gaps["training"], gaps["training alone"]
    return Gaps(*measured, TOLERANCE[model.dtype], errors)


def special_lengths(model: PreTrainedModel, max_length: int) -> list[int]:
    """The largest numbers in a model's configuration that a sequence can exceed, such as a window's size."""
    found: set[int] = set()

    def search(value: object) -> None:
        if isinstance(value, dict):
            for part in value.values():
                search(part)
        elif isinstance(value, list | tuple):
            for part in value:
                search(part)
        elif isinstance(value, int) and SHORTEST <= value < max_length:
            found.add(value)

    search(model.config.to_dict())
    return sorted(found)[-LENGTHS:]


def make_up(prompts: list[list[int]], text: list[int], ends: list[int]) -> Samples:
    """GROUP completions for each prompt, which end after so many tokens, on the CPU."""
    rows = []
    for prompt, end in zip(prompts, ends, strict=True):
        for i in range(GROUP):
            # The completions of a prompt differ, and in length too, so that a batch is padded.
            rows.append((len(prompt), prompt + text[i : i + max(1, end - len(prompt) - i)]))
    starts = torch.tensor([[start] for start, _ in rows])
    stops = torch.tensor([[len(ids)] for _, ids in rows])
    column = torch.arange(int(stops.max()))
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for _, ids in rows], batch_first=True)
    actions = ((column >= starts) & (column < stops))[:, 1:]
    finished = torch.ones(len(rows), dtype=torch.bool)
    return Samples(ids, column < stops, actions, torch.zeros(actions.shape), finished, GROUP)


def _differences(
    model: PreTrainedModel, samples: Samples, log_probs: torch.Tensor, temperature: float
) -> Iterator[float]:
    """The difference from the model's own forward pass, without cache and padding, for each prompt.

    In float32, it is the largest of any token, and in bfloat16 the largest mean of any completion.
    """
    for first in range(0, len(log_probs), samples.group_size):
        worst = []
        for row in range(first, first + samples.group_size):
            mask = samples.host.action_mask[row]
            ids = samples.sequence_ids[row, : int(mask.nonzero().max()) + 2]
            logits = model(input_ids=ids[None, :-1], use_cache=False).logits[0].float() / temperature
            plain = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]  # (T-1,)
            sampled = mask[: len(plain)].to(plain.device)
            gaps = (plain - log_probs[row, : len(plain)])[sampled].abs()
            gap = gaps.max() if model.dtype == torch.float32 else gaps.mean()
            worst.append(float(gap) if gap.isfinite() else float("inf"))
        yield max(worst)
