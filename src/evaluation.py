"""Held-out accuracy of a policy: during training, or with --eval-only, which can also compare two policies.

Each completion is judged twice: strictly (only marked answers) and leniently (the last number counts too),
which distinguishes a better answer format from better math. Every figure has a 95% interval over questions,
which shows how much the figure could differ if other questions of the same kind had been asked.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from src import console, models, parallel
from src.engine.master_weights import MasterWeights
from src.engine.memory import BatchSize
from src.engine.sampler import Sampling, decode, sample
from src.engine.self_check import check_model
from src.errors import InputError
from src.files import write_text
from src.intervals import Comparison, Estimate, compare, estimate_all, values_per_question, wilson
from src.math_verifier import MathVerifier
from src.problems import Problem, with_prompts
from src.run.log import environment

METHODS = {"lenient": "flexible", "strict": "strict"}  # name in the results: the verifier's method
FLIPS_SHOWN = 10  # flipped answers printed per direction; evaluation.json has all of them


@dataclass
class Answers:
    """Judged completions of N questions, sorted by question, n for each."""

    completions: list[str]  # N x n
    tokens: np.ndarray  # (N x n,) tokens of each completion, including the stop token
    finished: np.ndarray  # (N x n,) bool, False if truncated
    parsed: dict[str, list[str | None]]  # by name in METHODS: N x n answers, None if the verifier found none
    right: dict[str, np.ndarray]  # by name in METHODS: (N, n) bool


def answer_questions(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    verifier: MathVerifier,
    problems: list[Problem],
    n: int,
    sampling: Sampling,
    generator: torch.Generator | None,
    batch_size: int,
    progress: Callable[[int], None] = lambda done: None,
) -> Answers:
    """Answer each question n times and judge the answers.

    Args:
        problems: N problems with their prompts.
        n: Completions per question.
        generator: As for `sampler.sample`.
        batch_size: Approximate number of completions per batch.
        progress: Called after each batch with the number of completions in it.
    """
    answers = Answers([], np.zeros(0, int), np.zeros(0, bool), {name: [] for name in METHODS}, {})
    right: dict[str, list[bool]] = {name: [] for name in METHODS}
    per_batch = max(1, batch_size // n)
    for start in console.counted(range(0, len(problems), per_batch)):
        part = problems[start : start + per_batch]
        samples = sample(policy, [list(p.prompt_ids) for p in part], n, sampling, generator)
        completions = decode(tokenizer, samples)
        questions = [p.question for p in part for _ in range(n)]
        truths = [p.answer for p in part for _ in range(n)]
        for name, method in METHODS.items():
            verdicts = verifier.verify_batch(questions, completions, truths, method)
            answers.parsed[name] += [v["parsed_answer"] for v in verdicts]
            right[name] += [v["correct"] for v in verdicts]
        answers.completions += completions
        answers.tokens = np.append(answers.tokens, samples.lengths.cpu().numpy())
        answers.finished = np.append(answers.finished, samples.finished.cpu().numpy())
        progress(len(completions))
    verifier.metrics()  # resets the verifier's counts, because these completions are not part of training
    answers.right = {name: np.array(verdicts).reshape(len(problems), n) for name, verdicts in right.items()}
    return answers


# ----------------------------------------------------------------------------------------------------------
# During training


def evaluate(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    verifier: MathVerifier,
    problems: list[Problem],
    sampling: Sampling,
    at_once: BatchSize,
) -> dict[str, float]:
    """The eval/... metrics of the policy's greedy answers to held-out problems.

    Args:
        verifier: Its method is the one that eval/accuracy uses.
    """
    compute = partial(answer_questions, policy, tokenizer, verifier, problems, 1, sampling.greedy(), None)
    with console.phase("evaluate"):
        return answer_metrics(at_once.fit(compute), verifier.method)


def answer_metrics(answers: Answers, method: str) -> dict[str, float]:
    """The eval/... metrics of greedy answers.

    Args:
        method: The verifier's method in training, "flexible" or "strict". eval/accuracy uses it too.
    """
    name = next(name for name, verifiers_method in METHODS.items() if verifiers_method == method)
    accuracy = wilson(answers.right[name][:, 0])
    return {
        "eval/accuracy": accuracy.value,
        "eval/accuracy_low": accuracy.low,
        "eval/accuracy_high": accuracy.high,
        "eval/strict_accuracy": float(answers.right["strict"].mean()),
        "eval/len_mean": float(answers.tokens.mean()),
        "eval/truncated_frac": 1 - float(answers.finished.mean()),
        "eval/extracted_frac": sum(p is not None for p in answers.parsed[name]) / len(answers.completions),
    }


# ----------------------------------------------------------------------------------------------------------
# --eval-only


@dataclass
class Evaluation:
    """How one policy answered N questions."""

    name: str
    greedy: Answers
    samples: Answers | None

    def values(self, method: str) -> dict[str, np.ndarray]:
        """The policy's `values_per_question`, judged by one of METHODS."""
        samples = self.samples.right[method] if self.samples else None
        return values_per_question(self.greedy.right[method], samples)

    def summary(self) -> dict:
        """This policy's part of evaluation.json."""
        summary: dict = {"model": self.name}
        for method in METHODS:
            shown: dict = {
                name: estimate._asdict() for name, estimate in estimate_all(self.values(method)).items()
            }
            if self.samples:
                shown["any_right_frac"] = float(self.samples.right[method].any(axis=1).mean())
            summary[method] = shown
        metrics = answer_metrics(self.greedy, "flexible")
        names = ("eval/len_mean", "eval/truncated_frac", "eval/extracted_frac")
        return summary | {f"greedy_{name.removeprefix('eval/')}": metrics[name] for name in names}

    def rows(self, problems: list[Problem]) -> list[dict]:
        """A record per completion, for evaluation.jsonl."""
        rows = []
        for kind, answers in (("greedy", self.greedy), ("sample", self.samples)):
            if answers is None:
                continue
            for i, completion in enumerate(answers.completions):
                question, sample_number = divmod(i, answers.right["strict"].shape[1])
                row = {
                    "model": self.name,
                    "kind": kind,
                    "question": problems[question].question,
                    "answer": problems[question].answer,
                    "sample": sample_number,
                    "completion": completion,
                    "tokens": int(answers.tokens[i]),
                    "finished": bool(answers.finished[i]),
                    "parsed_answer": answers.parsed["lenient"][i],
                }
                right = {method: bool(answers.right[method][question, sample_number]) for method in METHODS}
                rows.append(row | right)
        return rows


def evaluate_only(
    args: SimpleNamespace,
    folder: Path,
    problems: list[Problem],
    verifier: MathVerifier,
    device: torch.device,
    dtype: torch.dtype,
) -> Path:
    """Answer held-out problems with one model or two, greedily and by sampling; print and save the accuracy.

    Args:
        args: main()'s parameters.
        folder: From `locate_run`; created here.

    Returns:
        The folder.

    Raises:
        InputError: A model cannot be used, or there are several processes.
    """
    if parallel.processes() > 1:
        raise InputError("--eval-only: runs in a single process; start it with python train.py")
    named = {"--model-name": args.model_name}
    if args.eval_against:
        named["--eval-against"] = args.eval_against
    prepared = []
    for flag, name in named.items():  # reject bad input before the first model loads
        models.policy_skeleton(name, flag, dtype, args.max_length)
        tokenizer = models.load_tokenizer(name, flag)
        prompted = with_prompts(problems, tokenizer, args.system_prompt, args.max_length)
        prepared.append((flag, name, tokenizer, prompted))
    evaluations = []
    console.start(len(problems) * (1 + args.eval_samples) * len(prepared), "completion")
    try:
        for flag, name, tokenizer, prompted in prepared:
            sampled = f" and {args.eval_samples} times at temperature {args.temperature}"
            how = f"greedily{sampled if args.eval_samples else ''}"
            console.say(f"Evaluating {name}: {len(problems)} questions, {how}")
            with console.phase("load the policy"):
                policy = models.load_policy(name, device, flag).requires_grad_(False)
                MasterWeights(policy, dtype)  # rounds the weights as training does; nothing is trained
            check_model(policy, [problem.prompt_ids for problem in prompted], args, f"{flag} {name}")
            evaluations.append(evaluate_policy(args, name, policy, tokenizer, verifier, prompted))
            del policy  # before the next one loads
    finally:
        console.stop()
        verifier.close()
    folder.mkdir(parents=True, exist_ok=True)
    settings = vars(args) | {"run_device": str(device), "compute_dtype": str(dtype)}
    report_evaluation(folder, settings, problems, evaluations)
    print(f"done: see {folder}", flush=True)
    return folder


def evaluate_policy(
    args: SimpleNamespace,
    name: str,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    verifier: MathVerifier,
    problems: list[Problem],
) -> Evaluation:
    """Answer each question greedily and with `eval_samples` samples; halve batches if memory runs out."""
    limits = (args.max_length, args.max_new_tokens)
    sampling = Sampling(args.temperature, args.top_p, *limits, models.stop_token_ids(policy, tokenizer))
    batch_size = BatchSize(args.rollouts_per_step * args.group_size)
    answers = partial(answer_questions, policy, tokenizer, verifier, problems)
    with console.phase("greedy"):
        greedy = batch_size.fit(partial(answers, 1, sampling.greedy(), None, progress=console.advance))
    if args.eval_samples == 0:
        return Evaluation(name, greedy, None)
    generator = torch.Generator(policy.device).manual_seed(args.seed)
    with console.phase(f"{args.eval_samples} samples"):
        explore = partial(answers, args.eval_samples, sampling, generator, progress=console.advance)
        return Evaluation(name, greedy, batch_size.fit(explore))


def report_evaluation(
    folder: Path, settings: dict, problems: list[Problem], evaluations: list[Evaluation]
) -> None:
    """Print one policy's figures, or compare two policies; write evaluation.json and evaluation.jsonl.

    Args:
        folder: The run's folder.
        settings: The resolved hyperparameters, for evaluation.json.
        evaluations: The policy's evaluation, and that of the policy to compare it with, if any.
    """
    result = {"questions": len(problems), **evaluations[0].summary()}
    if len(evaluations) == 1:
        by_method = [estimate_all(evaluations[0].values(method)) for method in METHODS]
        rows = [
            [_label(name, evaluations[0]), *(_share(e[name]) for e in by_method)] for name in by_method[0]
        ]
        console.table(["share right (95 % interval)", *METHODS], rows)
    else:
        result["against"] = evaluations[1].summary()
        result["comparison"] = {}
        for method in METHODS:
            compared = compare(*(evaluation.values(method) for evaluation in evaluations))
            flips = {
                direction: [_flip(method, i, problems[i], evaluations) for i in getattr(compared, direction)]
                for direction in ("gained", "lost")
            }
            differences = {name: estimate._asdict() for name, estimate in compared.differences.items()}
            result["comparison"][method] = {"differences": differences, "p_value": compared.p_value, **flips}
            _print_comparison(method, evaluations, compared, flips)
    result |= {"hyperparameters": settings, **environment()}
    text = json.dumps(result, indent=2, ensure_ascii=False) + "\n"
    write_text(folder / "evaluation.json", text)
    with (folder / "evaluation.jsonl").open("w", encoding="utf-8") as file:
        for evaluation in evaluations:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in evaluation.rows(problems))


def _print_comparison(
    method: str, evaluations: list[Evaluation], compared: Comparison, flips: dict[str, list[dict]]
) -> None:
    both = [estimate_all(evaluation.values(method)) for evaluation in evaluations]
    rows = [
        [_label(name, evaluations[0]), *(_share(e[name]) for e in both), _points(compared.differences[name])]
        for name in both[0]
    ]
    console.table(
        [f"{method}: share right (95 % interval)", "model", "against", "difference in points"], rows
    )
    print(
        f"{method}: {len(compared.gained)} questions gained, {len(compared.lost)} lost, greedily; "
        f"exact McNemar p = {compared.p_value:.2g}"
    )
    for direction, found in flips.items():
        for flip in found[:FLIPS_SHOWN]:
            answers = f"model {flip['model']!r}, against {flip['against']!r}"
            print(f"{direction} q={flip['question']!r}, a={flip['answer']!r}, {answers}")
        if len(found) > FLIPS_SHOWN:
            print(f"... and {len(found) - FLIPS_SHOWN} more {direction}, all in evaluation.json")


def _flip(method: str, i: int, problem: Problem, evaluations: list[Evaluation]) -> dict:
    model, against = (evaluation.greedy.parsed[method][i] for evaluation in evaluations)
    return {"question": problem.question, "answer": problem.answer, "model": model, "against": against}


def _label(name: str, evaluation: Evaluation) -> str:
    samples = evaluation.samples and evaluation.samples.right["strict"].shape[1]
    return f"{name} (any sample right)" if name == f"pass@{samples}" else name


def _share(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.1f} % ({100 * estimate.low:.1f} to {100 * estimate.high:.1f})"


def _points(estimate: Estimate) -> str:
    return f"{100 * estimate.value:+.1f} ({100 * estimate.low:+.1f} to {100 * estimate.high:+.1f})"
