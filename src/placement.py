"""Preparations for training: the device, the processes, the memory plan, and the reward model."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed

from src import console, models, parallel, threads
from src.engine.memory import bound_product_cache, free_memory, keep_freed_memory
from src.engine.memory_plan import Plan, check_fits
from src.engine.model_size import ModelSize, measure
from src.errors import InputError
from src.hub import EMBEDDED, TINYLLAMA
from src.problems import Problem
from src.reward_model import ACEMATH, BATCH_TOKENS, AceRewardModel, reward_model_bytes, system_prompt_for
from src.run.trackers import chosen_trackers

CPU = torch.device("cpu")
NO_REWARD_MODEL = "there is no reward model, so only the verifier decides"


# ----------------------------------------------------------------------------------------------------------
# Devices and processes


def start(args: SimpleNamespace) -> tuple[Accelerator, str]:
    """Set up device and processes, silence all processes but the first, and seed all random generators.

    The accelerator wraps no model: train.py's `update` sums the gradients of all processes itself.

    Args:
        args: main()'s parameters.

    Returns:
        The accelerator, and the name of the policy, from `choose_policy`.

    Raises:
        InputError: The questions of a step cannot be split evenly, or another device is already set up.
    """
    trackers = chosen_trackers(args.tracker, args.wandb_project)
    parallel.check_accelerate(os.environ)
    set_up_cuda()
    # Without a GPU and without cpu=True, accelerate would treat each of several processes as the only one.
    on_cpu = args.device == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    accelerator = Accelerator(cpu=on_cpu, log_with=trackers or None, project_dir=args.output)
    check_processes(accelerator.num_processes, args.rollouts_per_step)
    if not accelerator.is_main_process:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (stays open until the process ends)
    set_seed(args.seed)
    device = accelerator.device
    if args.device not in ("auto", device.type):
        raise InputError(
            f"--device {args.device}: accelerate uses {device.type}; if it was set up earlier in this Python "
            "process, start a new process"
        )
    if device.type == "cpu":
        limit_threads()
        keep_freed_memory()
        bound_product_cache()
    transformers.utils.logging.disable_progress_bar()  # hides the bars for loading weights, not for downloads
    return accelerator, parallel.from_first(lambda: choose_policy(args, device))


def limit_threads() -> None:
    """Compute with as many threads as the CPU quota allows, unless the user has chosen a number. Says so."""
    count, why = threads.available()
    if threads.is_chosen() or count >= threads.cores():
        return
    torch.set_num_threads(count)  # in case torch had loaded before src
    console.say(f"threads: {count} ({why})")


def set_up_cuda() -> None:
    """Choose PyTorch's settings for GPUs. Call this before anything uses CUDA; it changes nothing on CPUs.

    - Segments that can grow: the passes of an update all have different sizes, so without them freed memory
      would lie in blocks that do not fit. PYTORCH_ALLOC_CONF in the environment takes precedence.
    - No cuDNN attention: on Hopper and Blackwell PyTorch prefers it, but it plans for half a second whenever
      it sees a new shape, and nearly every pass has one (benchmarks/NOTES.md).
    - Sums in products of bfloat16 numbers stay in float32.
    """
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def check_processes(processes: int, rollouts_per_step: int) -> None:
    """Reject a number of processes among which the questions of a step cannot be split evenly.

    Raises:
        InputError: The number of questions is not a multiple of the number of processes.
    """
    if rollouts_per_step % processes:
        raise InputError(
            f"--rollouts-per-step {rollouts_per_step}: must be a multiple of the {processes} processes, "
            "each of which samples complete groups"
        )


# ----------------------------------------------------------------------------------------------------------
# The memory plan, and which reward model fits it


def choose_policy(args: SimpleNamespace, device: torch.device) -> str:
    """Resolve `--model-name auto`: TinyLlama if the run can train it, otherwise the bundled model.

    Prints which model it is, and why. Any other name is returned as it is.

    Args:
        args: main()'s parameters.
    """
    if args.model_name != "auto":
        return args.model_name
    if device.type == "cpu":
        why = "there is no GPU" if args.device == "auto" else "the run is on the CPU"
    else:
        try:
            skeleton = models.policy_skeleton(
                TINYLLAMA, "--model-name", models.pick_dtype(device, args.dtype), args.max_length
            )
            free = free_memory(device)
            needed = policy_plan(args, skeleton, device, [1]).fitted(free, host_memory()).min_bytes()
        except InputError as error:
            why = f"it cannot be loaded: {error}"
        else:
            if needed <= free:
                console.say(f"policy: {TINYLLAMA} (auto)")
                return TINYLLAMA
            why = f"it needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free on {device.type}"
    console.say(f"policy: the bundled model instead of TinyLlama (auto: {why})")
    console.say(f"to train TinyLlama anyway: --model-name {TINYLLAMA}")
    return EMBEDDED


def policy_plan(
    args: SimpleNamespace, skeleton: transformers.PreTrainedModel, device: torch.device, lengths: list[int]
) -> Plan:
    """The memory plan of a run without a reward model.

    Args:
        args: main()'s parameters.
        skeleton: From `models.policy_skeleton`, or that with a LoRA adapter.
        lengths: Number of tokens in each prompt.
    """
    if args.lora_rank:
        models.add_lora(skeleton, args.lora_rank)
    completions = args.rollouts_per_step * args.group_size
    return Plan(
        measure(skeleton, device.type),
        device.type,
        completions=completions,
        group_size=args.group_size,
        micro_batch_size=args.micro_batch_size,
        prompt_length=max(lengths),
        completion_length=min(args.max_new_tokens or args.max_length, args.max_length - min(lengths)),
        reference=args.kl_weight > 0 and not args.lora_rank,
        optimizer_steps=args.epochs_per_step * completions // args.train_batch_size,
        passes=-(-args.train_batch_size // args.micro_batch_size),
        gradient_checkpointing=args.gradient_checkpointing,
    )


def host_memory() -> float:
    """Bytes of free host memory for this process, if all processes on this machine share it evenly."""
    return free_memory(CPU) / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def plan(
    args: SimpleNamespace, problems: list[Problem], device: torch.device, dtype: torch.dtype
) -> tuple[RewardModelChoice, Plan]:
    """Choose the reward model, and what is moved to host memory so that the run fits on its GPU.

    Prints how much memory the run needs, and rejects what cannot fit. Nothing is loaded.

    Args:
        args: main()'s parameters.
        problems: The training problems, with their prompts.
        device, dtype: Where the policy computes, and in which dtype.

    Raises:
        InputError: The run cannot fit, or the reward model cannot be placed as requested.
    """
    skeleton = models.policy_skeleton(args.model_name, "--model-name", dtype, args.max_length)
    memory = policy_plan(args, skeleton, device, [len(problem.prompt_ids) for problem in problems])
    free, host_free = free_memory(device), host_memory()
    if args.reward_mode == "verifier":
        choice, memory = RewardModelChoice(None, "--reward-mode verifier"), memory.fitted(free, host_free)
    else:
        requested = (args.reward_model_name, args.reward_model_device, args.reward_model_8bit)
        choice, memory = choose_reward_model(
            *requested, args.model_name, memory, device, dtype, free, host_free
        )
    if args.reward_mode == "rm" and choice.name is None:
        raise InputError(
            f"--reward-mode rm: there is no reward model ({choice.why}); choose one with --reward-model-name"
        )

    def with_lora() -> ModelSize:
        models.add_lora(skeleton, 16)
        return measure(skeleton, device.type)

    can_be_8bit = choice.name not in (None, EMBEDDED) and not choice.load_in_8bit
    check_fits(memory, free, host_free, with_lora, choice.weights / 2 if can_be_8bit else 0.0)
    return choice, memory


@dataclass(frozen=True)
class RewardModelChoice:
    """Which reward model a run uses, where, and in which dtype; from `choose_reward_model`."""

    name: str | None  # None: only the verifier decides
    why: str
    placement: str = "device"  # "offload": there only while scoring; "stream": layer by layer; "cpu": never
    device: torch.device | None = None
    dtype: torch.dtype = torch.float32
    load_in_8bit: bool = False
    weights: float = 0.0  # bytes
    activations: float = 0.0  # bytes, while it scores
    piece: float = 0.0  # bytes of the weights on the device if it streams
    failed: bool = False  # True if it was requested but is not available

    def where(self) -> str:
        """The reward model's device and, if it is int8, its dtype, for messages."""
        assert self.device is not None
        device = self.device.type
        places = {"offload": f"{device} while it scores", "stream": f"{device} layer by layer"}
        return places.get(self.placement, device) + (", int8" if self.load_in_8bit else "")

    def added_to(self, memory: Plan) -> Plan:
        """The memory plan of a run with this reward model, given the plan of the run without one."""
        if self.placement == "cpu":
            return memory
        tokens = memory.completions * (memory.prompt_length + memory.completion_length)
        return replace(
            memory,
            reward_weights=self.weights,
            reward_activations=self.activations,
            reward_piece=self.piece,
            reward_passes=-(-tokens // BATCH_TOKENS),
        )

    def load(self) -> AceRewardModel:
        assert self.name is not None and self.device is not None
        return AceRewardModel(
            self.name,
            self.device,
            self.dtype,
            system_prompt_for(self.name),
            offload=self.placement in ("offload", "stream"),
            stream=self.placement == "stream",
            load_in_8bit=self.load_in_8bit,
        )


def choose_reward_model(
    requested: str,
    placement: str,
    load_in_8bit: bool,
    policy_name: str,
    memory: Plan,
    device: torch.device,
    dtype: torch.dtype,
    free: float,
    host_free: float,
) -> tuple[RewardModelChoice, Plan]:
    """Resolve `--reward-model-name auto` and `--reward-model-device auto`, reading only configurations.

    Args:
        requested, placement, load_in_8bit: The flags' values.
        policy_name: If it is "embedded", auto means the bundled reward model.
        memory: The plan of the run without a reward model.
        device, dtype: Where the policy computes, and in which dtype.
        free, host_free: Free bytes on the device and in host memory.

    Returns:
        The choice, and the plan of the run with that reward model.

    Raises:
        InputError: The requested placement is impossible.
    """
    without = memory.fitted(free, host_free)
    name, why = _resolve_name(requested, policy_name, device)
    if name is None:
        return RewardModelChoice(None, why), without
    places = _places(placement, requested != "auto", device)
    if load_in_8bit and name == EMBEDDED:
        raise InputError(
            "--reward-model-8bit: the bundled reward model has no int8 version; leave the flag out (the "
            "model takes only 0.3 GB)"
        )
    options, in_host_memory = [], []
    for place in places:
        where, what = (CPU, models.pick_dtype(CPU, "auto")) if place == "cpu" else (device, dtype)
        try:
            size = reward_model_bytes(name, what, load_in_8bit)
        except InputError as error:
            return RewardModelChoice(None, str(error), failed=True), without
        choice = RewardModelChoice(name, why, place, where, what, load_in_8bit, *size)
        fitted = choice.added_to(memory).fitted(free, host_free, _ways(placement, load_in_8bit))
        way = {"visits": "offload", "streams": "stream"}.get(fitted.moves.get("reward model", ""), place)
        options.append((replace(choice, placement=way), fitted))
        if place != "cpu" or choice.weights <= host_free - fitted.host_bytes():
            in_host_memory.append(options[-1])
    for option in in_host_memory:
        if option[1].max_bytes() <= free:
            return option
    if name == EMBEDDED:
        return options[0]
    if requested != "auto":  # one that may fit, else one that `check_fits` rejects
        return next((option for option in in_host_memory if option[1].min_bytes() <= free), options[0])
    needed = options[0][1].max_bytes()
    why = f"auto: {ACEMATH} and the policy need up to {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
    return RewardModelChoice(None, why), without


def _resolve_name(requested: str, policy_name: str, device: torch.device) -> tuple[str | None, str]:
    """The reward model that `--reward-model-name` means, or None, and why."""
    if requested == "none":
        return None, "--reward-model-name none"
    if requested != "auto":
        return requested, "requested"
    if policy_name == EMBEDDED:
        return EMBEDDED, "auto: it comes with the embedded policy"
    if device.type == "cuda":
        return ACEMATH, "auto"
    return None, f"auto: {ACEMATH} needs a GPU, and this run is on {device.type}"


def _places(placement: str, named: bool, device: torch.device) -> list[str]:
    """The places where the reward model may compute, best first: "device" or "cpu".

    Args:
        placement: The flag's value.
        named: Whether the user named the model, instead of leaving it at auto.
        device: Where the policy computes.

    Raises:
        InputError: The placement is impossible on that device.
    """
    if placement in ("cuda", "offload") and device.type != "cuda":
        raise InputError(f"--reward-model-device {placement}: this run is on {device.type}; leave it at auto")
    if placement == "cpu" and device.type != "cpu":
        return ["cpu"]
    if placement == "auto" and named and device.type != "cpu":
        return ["device", "cpu"]  # a model of 7 billion weights takes minutes per step on the CPU
    return ["device"]


def _ways(placement: str, load_in_8bit: bool) -> tuple[str, ...]:
    """Where the reward model's weights may be, for `Plan.fitted`. An int8 model cannot be moved."""
    if placement == "cuda" or load_in_8bit:
        return ("stays",)
    return ("visits", "streams") if placement == "offload" else ("stays", "visits", "streams")


@console.phase("load the reward model")
def load_reward_model(choice: RewardModelChoice, reward_mode: str) -> AceRewardModel | None:
    """Load the chosen reward model; None if only the verifier decides. Prints which model it is and why.

    Raises:
        InputError: Only some processes have room for it, or there is none and --reward-mode is rm.
    """
    console.say("Loading reward model and math verifier...")
    reward_model = None
    if choice.failed:
        console.warn(f"{NO_REWARD_MODEL}: {choice.why}")
    elif choice.name is None:
        console.say(f"reward model: none, only the verifier decides ({choice.why})")
    else:
        try:
            reward_model = choice.load()
        except (InputError, RuntimeError) as error:  # usually not enough memory for it
            console.warn(f"{NO_REWARD_MODEL}: {error}")
        else:
            console.say(f"reward model: {choice.name} on {choice.where()} ({choice.why})")
    if len(set(parallel.gather([reward_model is None]))) > 1:
        raise InputError(
            "--reward-model-name: not every process has room for the reward model; see --reward-model-device"
        )
    if reward_mode == "rm" and reward_model is None:
        raise InputError("--reward-mode rm: the reward model could not be loaded; see the reason above")
    return reward_model
