"""Check the values of main()'s parameters: their types, each on its own, and in combination."""

import difflib
import functools
import inspect
import math
import types
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import torch

from src import console
from src.errors import InputError
from src.run.resume import defaults_of, resumed_settings
from src.run.trackers import check_trackers, chosen_trackers

T = TypeVar("T")

MINIMUM = dict(
    epochs=1, train_batch_size=1, micro_batch_size=1, epochs_per_step=1, rollouts_per_step=1, max_length=2,
    warmup_samples=1, checkpoint_interval=1, keep_checkpoints=0, eval_interval=0, eval_samples=0, seed=0,
    lora_rank=0, max_skipped_updates=1, sample_interval=0,
)  # fmt: skip
ABOVE_0 = ("lr", "max_norm", "eps", "temperature")
AT_LEAST_0 = ("weight_decay", "kl_weight", "alpha", "beta", "w_min", "w_max", "k")


def select(record: type[T], args: SimpleNamespace, **others: Any) -> T:
    """Build a settings record, such as `Sampling`, from the parameters of main() that match its field names.

    Args:
        args: main()'s parameters.
        others: Values of the fields that are not parameters of main().
    """
    # The type is ignored because mypy does not know that `record` is a dataclass.
    names = [f.name for f in fields(record) if f.name not in others]  # type: ignore[arg-type]
    return record(**{name: getattr(args, name) for name in names}, **others)


def resumable(main: Callable[..., Path]) -> Callable[..., Path]:
    """Decorate main(): check the types of what is passed, and with `resume`, take the rest from the run."""

    @functools.wraps(main)
    def run(*args: Any, **kwargs: Any) -> Path:
        given = inspect.signature(main).bind(*args, **kwargs).arguments
        check_types(main, given)
        if given.get("resume"):
            given = resumed_settings(main, given)
            check_types(main, given)  # config.json may have been edited
        return main(**given)

    return run


def check_types(main: Callable, given: dict[str, Any]) -> None:
    """Reject values that do not have the types in main()'s annotations. The command line has its own check.

    Raises:
        InputError: A value has another type, or is not one of the choices.
    """
    annotations, defaults = get_type_hints(main), defaults_of(main)
    for name, value in given.items():
        if accepts(annotations[name], value):
            continue
        rule, choices = describe(annotations[name]), choices_in(annotations[name])
        similar = difflib.get_close_matches(str(value).lower(), choices, n=1)
        way_out = "None is the default"
        if similar:
            way_out = f"did you mean {[similar[0]] if 'list' in rule else similar[0]!r}?"
        elif defaults[name] is not None:
            way_out = f"for example {defaults[name]!r}"
        shown = f"--{name.replace('_', '-')} {value!r} ({type(value).__name__})"
        raise InputError(f"{shown}: must be {rule}; {way_out}")


def accepts(annotation: Any, value: Any) -> bool:
    """Whether an annotation of main() allows a value. Integers are numbers; True and False are not."""
    if isinstance(annotation, types.UnionType):
        return any(accepts(part, value) for part in get_args(annotation))
    if get_origin(annotation) is Literal:
        return isinstance(value, str) and value in get_args(annotation)
    if get_origin(annotation) is list:
        return isinstance(value, list) and all(accepts(get_args(annotation)[0], item) for item in value)
    if isinstance(value, bool):
        return annotation is bool
    return isinstance(value, (int, float) if annotation is float else annotation)


def describe(annotation: Any) -> str:
    """The values that an annotation of main() allows, in words."""
    if get_origin(annotation) is Literal:
        choices = [repr(choice) for choice in get_args(annotation)]
        return " or ".join([", ".join(choices[:-1]), choices[-1]])
    if get_origin(annotation) is list:
        return f"a list of {describe(get_args(annotation)[0])}"
    if isinstance(annotation, types.UnionType):
        return ", or ".join(map(describe, get_args(annotation)))
    words = {int: "an integer", float: "a number", bool: "True or False", str: "text", type(None): "None"}
    return words[annotation]


def choices_in(annotation: Any) -> list[str]:
    """All choices in an annotation; none if there are no Literals in it."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [choice for part in get_args(annotation) for choice in choices_in(part)]


def check_hyperparameters(args: SimpleNamespace) -> None:
    """Reject values that cannot work, before anything loads, and warn about rewards with surprising effects.

    Args:
        args: main()'s parameters.

    Raises:
        InputError: A value cannot work. The message gives the value, the rule and the way out.
    """
    _check_ranges(args)
    _check_combinations(args)
    _warn_about_rewards(args)
    if not args.eval_only:
        check_trackers(chosen_trackers(args.tracker, args.wandb_project))


def _refuse(args: SimpleNamespace, name: str, rule: str) -> NoReturn:
    raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: {rule}")


def _check_ranges(args: SimpleNamespace) -> None:
    for name, minimum in MINIMUM.items():
        if getattr(args, name) < minimum:
            _refuse(args, name, f"must be at least {minimum}")
    for name in ("max_steps", "max_new_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            _refuse(args, name, "must be at least 1; leave it out for no limit")
    if args.group_size < 2:
        _refuse(args, "group_size", "must be at least 2: an advantage compares the completions of a group")
    for name in ABOVE_0:
        if not 0 < getattr(args, name) < math.inf:
            way_out = "; for greedy answers see --eval-data" if name == "temperature" else ""
            _refuse(args, name, f"must be a finite number above 0{way_out}")
    for name in AT_LEAST_0:
        if not 0 <= getattr(args, name) < math.inf:
            _refuse(args, name, "must be a finite number, 0 or more")
    if args.seed >= 2**32:
        _refuse(args, "seed", "must be below 2**32")
    if not 0 < args.top_p <= 1:
        _refuse(args, "top_p", "must be above 0 and at most 1 (1 = sample from all tokens)")
    if not 0 < args.clip_eps < 1:
        _refuse(args, "clip_eps", "must be between 0 and 1, for example 0.2")


def _check_combinations(args: SimpleNamespace) -> None:
    if args.eval_interval and not args.eval_data:
        _refuse(args, "eval_interval", "needs --eval-data, the problems to evaluate on")
    if args.eval_only and not args.eval_data:
        raise InputError("--eval-only: needs --eval-data, the problems to evaluate on")
    if args.eval_only and args.resume:
        _refuse(
            args, "resume", "cannot be used with --eval-only; pass the checkpoint to evaluate as --model-name"
        )
    if args.eval_against and not args.eval_only:
        _refuse(args, "eval_against", "needs --eval-only, which compares it with --model-name")
    if args.w_min > args.w_max:
        _refuse(args, "w_min", f"must not be above --w-max {args.w_max}")
    batch = args.rollouts_per_step * args.group_size
    if batch % args.train_batch_size:
        _refuse(
            args,
            "train_batch_size",
            f"must divide --rollouts-per-step {args.rollouts_per_step} x --group-size {args.group_size} "
            f"= {batch} completions; for example {math.gcd(batch, args.train_batch_size)}",
        )
    if args.reward_model_8bit and args.reward_model_device == "offload":
        rule = "cannot be used with --reward-model-8bit: an int8 model cannot be offloaded"
        _refuse(args, "reward_model_device", rule)
    if args.device != "auto" and not getattr(torch, args.device).is_available():
        _refuse(args, "device", "PyTorch finds no such device on this machine; leave it at auto")


def _warn_about_rewards(args: SimpleNamespace) -> None:
    """Warn if a wrong answer can earn more than a right one, or a worse answer more than a better one."""
    if args.alpha + args.beta > 1:
        console.warn(
            f"--alpha {args.alpha} + --beta {args.beta} is above 1, so the bands overlap and a wrong answer "
            "can earn more than a right one; keep the sum at 1 or below"
        )
    lowest = args.w_min + (args.w_max - args.w_min) * math.tanh(-(args.alpha**3))
    if args.reward_scorer == "tanh" and args.reward_mode == "hybrid" and lowest < 0:
        console.warn(
            f"--reward-scorer tanh --alpha {args.alpha}: the worst answers have the negative weight "
            f"{lowest:.2f}, so they earn a positive reward; lower --alpha or raise --w-min"
        )
