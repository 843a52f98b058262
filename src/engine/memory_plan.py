"""What a run keeps in memory in each of its phases, and what it moves to host memory so that it fits.

Everything is computed from the models' configurations, before anything loads.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from src.console import say, warn
from src.engine.logprobs import PASS_COST, REFERENCE_PASS, largest_pass
from src.engine.model_size import ModelSize
from src.engine.static_decoder import cache_columns
from src.engine.token_log_probs import KEPT_LOGITS, vocabulary_block
from src.errors import InputError

# Bytes taken by Python and its libraries or, on a GPU, by the context and the kernels.
PROGRAM = {"cpu": 0.9e9, "cuda": 0.8e9, "mps": 0.5e9}
# The parts that can live in host memory: the phase that needs them on the GPU, how often a step copies them
# (2: they change, so they are also copied back), and the ways. "visits": as a whole. "streams": in pieces,
# which takes less memory and more time.
MOVABLE = {
    "reference": ("reference", 1, ("visits",)),
    "trained weights": ("update", 2, ("visits",)),
    "Adam": ("update", 2, ("visits", "streams")),
    "reward model": ("score", 1, ("visits", "streams")),
}
# For comparing ways to save memory, not for predicting times: a card of 24 GB on PCIe 4.0.
TRANSFER_RATE = 20e9  # bytes per second
COMPUTE_RATE = 55e12  # floating-point operations per second
CAPTURE_SECONDS = 0.3  # to capture the decode step again, because its cache was freed
MARGIN = 0.97  # the share of the free memory that is planned for, because not every byte is counted


@dataclass(frozen=True)
class Plan:
    """The choices that decide what a run keeps in memory on the device that trains."""

    policy: ModelSize
    device: str  # cpu, cuda or mps
    completions: int  # B
    group_size: int  # G
    micro_batch_size: int
    prompt_length: int  # tokens in the longest prompt
    completion_length: int  # tokens in the longest completion
    reference: bool  # whether a frozen copy of the policy is kept
    optimizer_steps: int = 1  # in each step of the run
    passes: int = 2  # forward and backward passes of each optimizer step
    reward_weights: float = 0.0  # bytes on the device that trains
    reward_activations: float = 0.0  # bytes, while it scores
    reward_piece: float = 0.0  # bytes of its weights on the device if it streams
    reward_passes: int = 1  # forward passes in each step of the run
    # The choices of `fitted`
    moves: Mapping[str, str] = field(default_factory=dict)  # for parts of MOVABLE: "visits" or "streams"
    gradient_checkpointing: bool = False
    frees_cache: bool = False  # free the decoder's cache after every rollout

    # ------------------------------------------------------------------------------------------------------
    # What is where in which phase

    def table(self) -> dict[str, dict[str, float]]:
        """Bytes of each part on the device, in each phase. Only one phase runs at a time."""
        p, program, movable = self.policy, PROGRAM[self.device], self.movable()
        trained = movable["trained weights"]
        # All weights load in float32, before they are rounded to the compute dtype.
        phases = {"load": {"program": program, "policy": 4.0 * p.weights, "trained weights": trained}}
        stays = {"program": program, "policy": float(p.weights * p.itemsize)} | movable
        for phase, added in self._added().items():
            here = {part: size for part, size in stays.items() if part not in self.moves}
            for part, way in self.moves.items():
                if MOVABLE[part][0] == phase:
                    here[part] = self._piece(part) if way == "streams" else stays[part]
            phases[phase] = here | added
        return {
            phase: {part: size for part, size in parts.items() if size} for phase, parts in phases.items()
        }

    def movable(self) -> dict[str, float]:
        """Bytes of the parts in MOVABLE."""
        p = self.policy
        return {
            "reference": float(p.weights * p.itemsize) if self.reference else 0.0,
            "trained weights": 4.0 * p.trained if p.itemsize < 4 else 0.0,  # if they are separate
            "Adam": 8.0 * p.trained,
            "reward model": self.reward_weights,
        }

    def _piece(self, part: str) -> float:
        """Bytes of a part on the device if it streams."""
        return self.reward_piece if part == "reward model" else 8.0 * self.policy.largest

    def _added(self) -> dict[str, dict[str, float]]:
        """The bytes that each phase adds."""
        p = self.policy
        columns = self.prompt_length + self.completion_length
        # On a GPU, the cache is kept, because a CUDA graph holds its addresses (see static_decoder.py).
        on_gpu = self.device == "cuda"
        cache = self.completions * p.cache * (cache_columns(columns) if on_gpu else columns)
        kept = {"kept cache": cache if on_gpu and not self.frees_cache else 0.0}
        return {
            "rollout": {
                "cache": cache,
                "logits": 16.0 * self.completions * p.vocabulary,  # four float32 tensors (sampler._pick)
                "packed weights": p.weights * p.itemsize if self.device == "cpu" else 0.0,  # LlamaDecoder
            },
            "score": {"activations": self.reward_activations, **kept},
            "reference": {
                "logits": self._logits(REFERENCE_PASS * self.micro_batch_size, backward=False),
                "activations": self.tokens(REFERENCE_PASS * self.micro_batch_size) * p.forward,
                **kept,
            },
            "update": {**self._update(), **kept},
        }

    def _update(self) -> dict[str, float]:
        """The bytes that an update's largest pass adds at its peak."""
        p, tokens = self.policy, self.tokens(self.micro_batch_size)
        kept = tokens * (p.checkpointed if self.gradient_checkpointing else p.activation)
        in_a_layer = tokens * (p.backward + (p.recomputed if self.gradient_checkpointing else 0.0))
        # The logits are freed before the backward pass reaches the layers.
        logits = self._logits(self.micro_batch_size)
        activations = kept + max(0.0, in_a_layer - logits)
        # The sums of the gradients in float32, and the pass's own gradients. Each of those is freed when
        # it has been added to the sums; only llama.py returns all at once, as its activations are freed.
        own = float(p.itemsize * p.largest) if p.itemsize < 4 else 0.0
        if p.itemsize < 4 and self.device == "cpu":
            own = max(0.0, float(p.itemsize * p.trained) - logits - activations)
        sums = 4.0 * p.trained
        if self.passes == 1 and p.flat and self.device == "cuda":
            # The sums grow from the head down, while the activations of one layer after the other are freed.
            first = 4.0 * p.largest
            if first + logits + activations > sums + in_a_layer:
                sums = first
            else:
                logits, activations = 0.0, in_a_layer
        return {"gradients": sums + own, "logits": logits, "activations": activations}

    def _logits(self, completions: int, backward: bool = True) -> float:
        """Bytes of the logits of a pass, of which only a block of the vocabulary exists at a time."""
        p = self.policy
        if p.flat:
            completions, _ = largest_pass(completions, self.group_size)
        sampled = min(completions, self.completions) * self.completion_length
        block = min(vocabulary_block(self.device), p.vocabulary)
        logits = (8.0 + (p.itemsize if backward else 0)) * sampled * block
        # The hidden states of the sampled tokens and, in the backward pass, their gradient
        logits += (p.itemsize + (4.0 if backward else 0.0)) * sampled * p.hidden
        if backward and self.device == "cpu" and p.itemsize == 4:
            logits += min(KEPT_LOGITS, 4.0 * sampled * p.vocabulary)
        return logits

    def tokens(self, completions: int) -> int:
        """Tokens of the largest pass with at most so many completions, including padding."""
        completions = min(completions, self.completions)
        prompt, completion = self.prompt_length, self.completion_length
        if self.policy.flat:
            completions, prompts = largest_pass(completions, self.group_size)
            return completions * completion + prompts * prompt
        # Each completion has a row of its own, or fewer rows hold them. In that case, padding is limited by
        # what it would cost to compute each row in a pass of its own (logprobs.micro_batches).
        fewer = completions * completion + (completions - 1) * (prompt + PASS_COST) - PASS_COST
        return max(completions * (prompt + completion), fewer)

    def max_bytes(self) -> float:
        """Bytes needed if every completion has the maximum length."""
        return max(sum(parts.values()) for parts in self.table().values())

    def min_bytes(self) -> float:
        """Bytes without which a run cannot start: everything that does not depend on completion lengths."""
        short = replace(self, prompt_length=0, completion_length=0, completions=0)
        return max(
            sum(size for part, size in parts.items() if part != "activations")
            for parts in short.table().values()
        )

    def host_bytes(self) -> float:
        """Bytes of the parts that live in host memory."""
        sizes = self.movable()
        return sum(sizes[part] for part in self.moves)

    # ------------------------------------------------------------------------------------------------------
    # How a run fits

    def cost(self) -> float:
        """About how many seconds a step takes longer because of the savings, on a card of 24 GB."""
        sizes, seconds = self.movable(), CAPTURE_SECONDS * self.frees_cache
        for part, way in self.moves.items():
            visits = 1
            if way == "streams":
                visits = self.optimizer_steps if part == "Adam" else self.reward_passes
            seconds += visits * MOVABLE[part][1] * sizes[part] / TRANSFER_RATE
        if self.gradient_checkpointing:
            tokens = self.completions * self.completion_length
            seconds += 2.0 * self.policy.weights * tokens / COMPUTE_RATE
        return seconds

    def options(self, reward_ways: tuple[str, ...]) -> Iterator["Plan"]:
        """All ways to run this plan on a GPU that compute exactly the same.

        Args:
            reward_ways: Where the reward model may be: "stays", "visits" and "streams".
        """
        ways = {
            part: reward_ways if part == "reward model" else ("stays", *MOVABLE[part][2])
            for part, size in self.movable().items()
            if size
        }
        checkpointing = (True,) if self.gradient_checkpointing else (False, True)
        if self.policy.checkpointed == float("inf"):
            checkpointing = (self.gradient_checkpointing,)
        for chosen in itertools.product(*ways.values()):
            moves = {part: way for part, way in zip(ways, chosen, strict=True) if way != "stays"}
            for recompute, frees_cache in itertools.product(checkpointing, (False, True)):
                yield replace(self, moves=moves, gradient_checkpointing=recompute, frees_cache=frees_cache)

    def fitted(
        self, free: float, host_free: float, reward_ways: tuple[str, ...] = ("stays", "visits", "streams")
    ) -> "Plan":
        """The fastest way to run this plan in the free memory; if there is none, the smallest.

        Args:
            free, host_free: Free bytes on the device and in host memory.
            reward_ways: As in `options`.
        """
        if self.device != "cuda":
            return self
        options = [plan for plan in self.options(reward_ways) if plan.host_bytes() <= host_free]
        fits = [plan for plan in options if plan.max_bytes() <= MARGIN * free]
        if fits:
            return min(fits, key=lambda p: (p.cost(), list(p.moves.values()).count("streams"), p.max_bytes()))
        return min(options, key=Plan.max_bytes, default=self)

    # ------------------------------------------------------------------------------------------------------
    # What a run prints

    def describe(self, free: float) -> str:
        """One line with the total, the free memory and each part of the largest phase, in GB."""
        phases = self.table()
        largest = max(phases, key=lambda phase: sum(phases[phase].values()))
        shown = ", ".join(f"{part} {size / 1e9:.1f}" for part, size in phases[largest].items() if size >= 5e7)
        needed = f"up to {self.max_bytes() / 1e9:.1f} of the {free / 1e9:.1f} GB free on {self.device}"
        return f"memory: {needed} (in the {largest} phase: {shown})"

    def describe_savings(self) -> str:
        """One line with what the plan does to fit, and what that costs."""
        names = {"Adam": "Adam's moments", "reward model": "the reward model", "reference": "the reference"}
        moved = [names.get(part, f"the {part}") for part in MOVABLE if part in self.moves]
        savings = []
        if moved:
            verb = "are" if len(moved) > 1 or moved[0].endswith("s") else "is"
            where = f"in host memory ({self.host_bytes() / 1e9:.1f} GB) while not in use"
            savings.append(f"{_listed(moved)} {verb} {where}")
        if self.gradient_checkpointing:
            savings.append("each layer is computed again in the backward pass")
        if self.frees_cache:
            savings.append("the decoder's cache is freed after each rollout")
        return f"to fit, {_listed(savings, ', and ')}; this costs about {self.cost():.1f} s a step"


def _listed(items: list[str], last: str = " and ") -> str:
    """The items as an English list: a, b and c."""
    return last.join(filter(None, [", ".join(items[:-1]), *items[-1:]]))


def check_fits(
    plan: Plan, free: float, host_free: float, with_lora: Callable[[], ModelSize], eight_bit: float
) -> None:
    """Print how much memory a run needs. Refuse a run that cannot fit, and warn about one that may not.

    Args:
        plan: The run's plan.
        free, host_free: Free bytes on the device and in host memory.
        with_lora: Measures the policy with `--lora-rank 16`; only called if something does not fit.
        eight_bit: Bytes of the reward model in int8; 0 if int8 is not an option.

    Raises:
        InputError: The run cannot fit. The message names flags that would make it fit.
    """
    say(plan.describe(free))
    if plan.cost():
        say(plan.describe_savings())
    if plan.max_bytes() <= free:
        return
    lora = with_lora() if plan.policy.trained == plan.policy.weights else None
    found = ways_out(plan, lora, free, host_free, eight_bit)
    way_out = "use a smaller --model-name or --max-new-tokens"
    if found:
        way_out = f"options that fit at full length: {', '.join(found)}"
    if plan.min_bytes() > free:
        raise InputError(
            f"memory: the run needs {plan.min_bytes() / 1e9:.1f} GB on {plan.device} before the first token, "
            f"but only {free / 1e9:.1f} GB are free; {way_out}"
        )
    warn(
        f"memory may run out: completions of full length need {plan.max_bytes() / 1e9:.1f} GB on "
        f"{plan.device}, but only {free / 1e9:.1f} GB are free; {way_out}"
    )


def ways_out(
    plan: Plan, with_lora: ModelSize | None, free: float, host_free: float, eight_bit: float
) -> list[str]:
    """The shortest sets of flags with which the run fits at full length, each with the memory that it needs.

    Each flag is tried on its own and in combination with LoRA. What a run can do without flags
    (`Plan.options`) is included.
    """
    tries: dict[str, Plan] = {}
    if plan.reference:
        tries["--kl-weight 0"] = replace(plan, reference=False)
    if plan.micro_batch_size > 1:
        tries["--micro-batch-size 1"] = replace(plan, micro_batch_size=1)
    if plan.device != "cuda" and not plan.gradient_checkpointing:
        tries["--gradient-checkpointing"] = replace(plan, gradient_checkpointing=True)
    if plan.reward_weights:
        if plan.device == "cuda":
            tries["--reward-model-device cpu"] = replace(plan, reward_weights=0.0, reward_activations=0.0)
        if eight_bit:
            tries["--reward-model-8bit"] = replace(plan, reward_weights=eight_bit)
        tries["--reward-model-name none"] = replace(plan, reward_weights=0.0, reward_activations=0.0)
    if with_lora:
        tries |= {
            f"--lora-rank 16 {flags}".strip(): replace(changed, policy=with_lora, reference=False)
            for flags, changed in {"": plan, **tries}.items()
        }
    fits = {}
    for flags, changed in tries.items():
        ways = ("stays",) if "8bit" in flags else ("stays", "visits", "streams")
        size = replace(changed, moves={}).fitted(free, host_free, ways).max_bytes()
        if size <= free:
            fits[flags] = size
    shortest = min((flags.count("--") for flags in fits), default=0)
    return [f"{flags} ({size / 1e9:.1f} GB)" for flags, size in fits.items() if flags.count("--") == shortest]
