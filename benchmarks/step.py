"""A GRPO step here, in TRL's GRPOTrainer and in a plain loop: python benchmarks/step.py [--help]

A step has 8 questions x 8 completions of the bundled model, the verifier's reward, a KL term, and a single
optimizer step. It computes in bfloat16, as on processors with matrix units (AMX), or with `--dtype float32`
as on those without. Each program runs in its own process and takes a step when told to. The programs take
turns, so that a slow moment of the machine does not hit only one of them. With `--tokens` the end token is
suppressed, so all programs do the same work. With `--tokens 0` completions end by themselves, after at most
64 tokens.

- ours: train.py's own functions. The trained weights are float32, and the model computes with them rounded to
  the dtype.
- trl: GRPOTrainer with its defaults, which also trains float32 weights and computes in bfloat16 through
  autocast.
- trl-fast: GRPOTrainer with weights in the dtype and without gradient checkpointing. This is faster, but
  bfloat16 rounds small updates away.
- plain: what a first version looks like, modeled on tiny-grpo: one question after another, padded batches of
  8, all logits at once, and gradient checkpointing.
- plain-kept: the same without gradient checkpointing, which fits in memory here.
"""

import dataclasses
import functools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch
import tyro
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
T = TypeVar("T")
Program = Literal["ours", "trl", "trl-fast", "plain", "plain-kept"]
ANSWERS: int  # the file descriptor that a worker process writes its answers to
LIMIT, TEMPERATURE, KL, LR = 64, 0.8, 0.01, 1e-6
MAX_LENGTH = 2048  # tokens of prompt + completion


@dataclass(frozen=True)
class Task:
    """The work of a step, the same for every program."""

    data: str  # a file of problems, of which the first are used
    model: str
    tokens: int  # of each completion; 0: completions end by themselves, after at most LIMIT tokens
    dtype: str = "bfloat16"
    device: str = "cpu"
    questions: int = 8
    group_size: int = 8  # completions per question
    prompt_ids: list[list[int]] | None = None  # replace the problems' own prompts

    @property
    def completions(self) -> int:
        return self.questions * self.group_size

    @property
    def max_new_tokens(self) -> int:
        return self.tokens or LIMIT

    def problems(self, tokenizer) -> list:
        """The problems with their prompts, as many as there are questions."""
        from src.problems import read_problems, with_prompts

        problems = read_problems(self.data, "--data")[: self.questions]
        if self.prompt_ids is None:
            return with_prompts(problems, tokenizer, None, MAX_LENGTH)
        pairs = zip(problems, self.prompt_ids, strict=True)
        return [dataclasses.replace(problem, prompt_ids=tuple(ids)) for problem, ids in pairs]

    def varied(self, rewards: list[float]) -> torch.Tensor:
        """Rewards (B,) that differ within every group, so that every completion has an advantage."""
        return torch.tensor(rewards) + torch.linspace(0, 0.1, self.completions)


class Phases:
    """Measures the seconds that each part of a step takes."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str):
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def wrap(self, owner, method: str, name: str) -> None:
        """Measure a method of an object that belongs to a library."""
        original = getattr(owner, method)

        def timed(*args, **kwargs):
            with self(name):
                return original(*args, **kwargs)

        setattr(owner, method, timed)


def verdicts(verifier, questions: list[str], completions: list[str], answers: list[str]) -> list[float]:
    """1 for each right completion, 0 for each wrong one."""
    return [float(v["correct"]) for v in verifier.verify_batch(questions, completions, answers)]


# ----------------------------------------------------------------------------------------------------------
# The programs. Each is a generator that yields {} after its setup, and after each step its phases and tokens.


def ours(task: Task) -> Iterator[dict]:
    """train.py's own functions, called as main() calls them."""
    import train
    from src import models
    from src.engine.master_weights import MasterWeights
    from src.engine.memory import BatchSize, bound_product_cache, keep_freed_memory
    from src.engine.sampler import Sampling, decode, sample
    from src.grpo import UpdateSettings, compute_advantages
    from src.math_verifier import MathVerifier
    from src.placement import set_up_cuda
    from src.run.checkpoint import TrainingState

    device = torch.device(task.device)
    if task.device == "cpu":
        keep_freed_memory()
        bound_product_cache()
    else:
        set_up_cuda()
    tokenizer, policy = models.load_tokenizer(task.model), models.load_policy(task.model, device)
    master = MasterWeights(policy, getattr(torch, task.dtype))
    reference = models.make_reference(policy, None)
    optimizer = torch.optim.AdamW(master.parameters, lr=LR, weight_decay=0.0, fused=True)
    verifier, problems = MathVerifier(), task.problems(tokenizer)
    prompts = [list(problem.prompt_ids) for problem in problems]
    questions = [problem.question for problem in problems for _ in range(task.group_size)]
    answers = [problem.answer for problem in problems for _ in range(task.group_size)]
    generator = torch.Generator(device).manual_seed(0)
    state = TrainingState(policy, tokenizer, master, optimizer, {"order": torch.Generator().manual_seed(0)})
    # Without stop tokens, every completion reaches its limit.
    stop_ids = [] if task.tokens else models.stop_token_ids(policy, tokenizer)
    sampling = Sampling(
        temperature=TEMPERATURE, top_p=1.0, max_length=MAX_LENGTH, max_new_tokens=task.max_new_tokens,
        stop_ids=stop_ids,
    )  # fmt: skip
    settings = UpdateSettings(
        train_batch_size=task.completions, epochs_per_step=1, temperature=TEMPERATURE, kl_weight=KL,
        clip_eps=0.2, max_norm=1.0, loss_normalizer="token", max_length=MAX_LENGTH, max_new_tokens=LIMIT,
    )  # fmt: skip
    micro_batch = BatchSize(32)
    yield {}
    while True:
        phase = Phases()
        with phase("generate"):
            samples = sample(policy, prompts, task.group_size, sampling, generator)
        with phase("verify"):
            right = verdicts(verifier, questions, decode(tokenizer, samples), answers)
        advantages = compute_advantages(task.varied(right), task.group_size, "batch")
        with phase("reference"):
            ref_log_probs = train.reference_log_probs(reference, samples, TEMPERATURE, micro_batch)
        with phase("update"):
            result = train.update(policy, state, samples, advantages, ref_log_probs, settings, micro_batch)
            metrics = result.metrics(samples)
        yield {
            "phases": phase.seconds,
            "tokens": int(samples.action_mask.sum()),
            "sampler_gap": metrics["policy/sampler_gap"],
        }


def trl(task: Task, settings: dict | None = None) -> Iterator[dict]:
    """TRL's GRPOTrainer with its own settings, 8 completions per pass."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from src import hub, models
    from src.math_verifier import MathVerifier

    verifier, tokenizer = MathVerifier(), models.load_tokenizer(task.model)
    rows = [
        {"prompt": [{"role": "user", "content": p.question}], "answer": p.answer}
        for p in task.problems(tokenizer)
    ]
    phase, tokens = Phases(), []

    def reward(prompts, completions, completion_ids, answer, **_):
        tokens.append(sum(map(len, completion_ids)))
        with phase("verify"):
            questions, texts = [p[0]["content"] for p in prompts], [c[0]["content"] for c in completions]
            right = verdicts(verifier, questions, texts, answer)
        return [r + 0.1 * i / len(right) for i, r in enumerate(right)]  # every completion has an advantage

    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(), num_generations=task.group_size, per_device_train_batch_size=8,
        gradient_accumulation_steps=task.completions // 8, max_completion_length=task.max_new_tokens,
        temperature=TEMPERATURE, beta=KL, learning_rate=LR, weight_decay=0.0, use_cpu=task.device == "cpu",
        bf16=task.dtype == "bfloat16", save_strategy="no", report_to=[], max_steps=10_000,
        shuffle_dataset=False, disable_tqdm=True, logging_strategy="no",
        generation_kwargs={"min_new_tokens": task.tokens} if task.tokens else None, **(settings or {}),
    )  # fmt: skip
    trainer = GRPOTrainer(
        hub.resolve(task.model, "--model-name"), reward_funcs=reward, args=config,
        train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[turns(phase, tokens)],
    )  # fmt: skip
    phase.wrap(trainer, "_generate", "generate")
    measure_reference(trainer, phase)
    trainer.train()
    yield {}


def turns(phase: Phases, tokens: list[int]):
    """A trainer callback that waits for the program's turn before each step, and answers after it.

    TRL's loop cannot be stepped from outside.
    """
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        is_set_up = False

        def on_step_begin(self, *_, **__):
            if not self.is_set_up:
                answer_with({})
            self.is_set_up = True
            wait_for_turn()
            phase.seconds = {}
            tokens.clear()

        def on_step_end(self, *_, **__):
            answer_with({"phases": phase.seconds, "tokens": sum(tokens)})

    return Turns()


def measure_reference(trainer, phase: Phases) -> None:
    """Count as `reference` the log-probs that TRL computes before its update, while it scores completions."""
    is_scoring = False
    score, log_probs = trainer._generate_and_score_completions, trainer._get_per_token_logps_and_entropies

    def timed_score(*args, **kwargs):
        nonlocal is_scoring
        is_scoring = True
        try:
            return score(*args, **kwargs)
        finally:
            is_scoring = False

    def timed_log_probs(*args, **kwargs):
        if not is_scoring:
            return log_probs(*args, **kwargs)
        with phase("reference"):
            return log_probs(*args, **kwargs)

    trainer._generate_and_score_completions = timed_score
    trainer._get_per_token_logps_and_entropies = timed_log_probs


def trl_fast(task: Task) -> Iterator[dict]:
    """The fastest settings of TRL on this machine."""
    return trl(task, {"model_init_kwargs": {"dtype": task.dtype}, "gradient_checkpointing": False})


def plain(task: Task, checkpointing: bool = True) -> Iterator[dict]:
    """One question after another, padded batches, full logits, weights trained in the dtype itself."""
    import copy

    from transformers import AutoModelForCausalLM

    from src import hub, models
    from src.math_verifier import MathVerifier

    tokenizer, path = models.load_tokenizer(task.model), hub.resolve(task.model, "--model-name")
    policy = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, task.dtype)).eval()
    reference = copy.deepcopy(policy).requires_grad_(False)
    if checkpointing:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LR, weight_decay=0.0)
    verifier = MathVerifier()
    problems = [problem for problem in task.problems(tokenizer) for _ in range(task.group_size)]
    questions, answers = [problem.question for problem in problems], [problem.answer for problem in problems]
    ids, mask = pad_left([list(problem.prompt_ids) for problem in problems], tokenizer.pad_token_id)

    yield {}
    while True:
        phase = Phases()
        with phase("generate"), torch.no_grad():
            sequences = generate_group_by_group(policy, ids, mask, tokenizer.pad_token_id, task)  # (B, T)
        new = sequences[:, ids.shape[1] :]
        is_end = new == tokenizer.eos_token_id
        real = torch.ones_like(new)
        if not task.tokens:
            real = ((is_end.cumsum(1) - is_end.long()) == 0).long()  # up to and including the first end token
        attention = torch.cat([mask, real], dim=1)
        actions = torch.cat([torch.zeros_like(mask), real], dim=1)[:, 1:]
        with phase("verify"):
            texts = tokenizer.batch_decode(new, skip_special_tokens=True)
            right = verdicts(verifier, questions, texts, answers)
        rewards = task.varied(right).view(task.questions, task.group_size)
        centered = rewards - rewards.mean(1, keepdim=True)
        advantages = (centered / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
        parts = torch.arange(task.completions).split(8)
        with phase("reference"), torch.no_grad():
            old = [full_log_probs(policy, sequences[part], attention[part]) for part in parts]
            frozen = [full_log_probs(reference, sequences[part], attention[part]) for part in parts]
        with phase("update"):
            policy.train()  # transformers checkpoints only in training mode
            for part, before, base in zip(parts, old, frozen, strict=True):
                now = full_log_probs(policy, sequences[part], attention[part])
                losses = plain_losses(now, before, base, advantages[part])
                ((losses * actions[part]).sum() / actions.sum()).backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            policy.eval()
        yield {"phases": phase.seconds, "tokens": int(real.sum())}


def pad_left(prompts: list[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask (B, P) of prompts, padded on the left to the longest."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (longest - len(p)) + p for p in prompts])
    return ids, torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])


def generate_group_by_group(
    policy, ids: torch.Tensor, mask: torch.Tensor, pad_id: int, task: Task
) -> torch.Tensor:
    """Prompts (B, P), padded on the left, each followed by a completion, padded on the right: (B, T)."""
    groups = [
        policy.generate(
            ids[rows], attention_mask=mask[rows], do_sample=True, temperature=TEMPERATURE, top_k=0, top_p=1.0,
            pad_token_id=pad_id, max_new_tokens=task.max_new_tokens, min_new_tokens=task.tokens or None,
        )
        for rows in torch.arange(task.completions).split(task.group_size)
    ]  # fmt: skip
    sequences = torch.full((task.completions, max(group.shape[1] for group in groups)), pad_id)
    for i, group in enumerate(groups):
        sequences[i * task.group_size : (i + 1) * task.group_size, : group.shape[1]] = group
    return sequences


def full_log_probs(model, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Log-probs (b, T-1) of all tokens (b, T) but the first, computed from all logits at once."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    return (logits[:, :-1].float() / TEMPERATURE).log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]


def plain_losses(
    now: torch.Tensor, before: torch.Tensor, base: torch.Tensor, advantages: torch.Tensor
) -> torch.Tensor:
    """The loss of each token, with the KL term.

    Args:
        now: (b, T-1) log-probs under the policy.
        before: The same when the completions were sampled.
        base: The same under the reference.
        advantages: (b,).
    """
    ratio = (now - before).exp()
    advantage = advantages[:, None]
    surrogate = torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    kl = (base - now).exp() - (base - now) - 1
    return KL * kl - surrogate


def plain_kept(task: Task) -> Iterator[dict]:
    """The plain loop without gradient checkpointing."""
    return plain(task, checkpointing=False)


PROGRAMS: dict[str, Callable[[Task], Iterator[dict]]] = {
    "ours": ours,
    "trl": trl,
    "trl-fast": trl_fast,
    "plain": plain,
    "plain-kept": plain_kept,
}


# ----------------------------------------------------------------------------------------------------------
# Turns


def in_turns(
    runs: Mapping[str, Callable[[], T]], repetitions: int, verbose: bool = False
) -> dict[str, list[tuple[float, T]]]:
    """Run several programs in turns, after one warm-up round.

    Args:
        runs: By name of a program, a function that runs it once.
        repetitions: Rounds after the warm-up.
        verbose: Print the seconds of every run.

    Returns:
        By name of a program, the seconds and the result of each run.
    """
    done: dict[str, list[tuple[float, T]]] = {name: [] for name in runs}
    for repetition in range(repetitions + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            result = run()
            seconds = time.perf_counter() - started
            if verbose:
                print(f"{name} {repetition or 'warm-up'}: {seconds:.1f} s", flush=True)
            if repetition:
                done[name].append((seconds, result))
    return done


def answer_with(values: dict) -> None:
    """Send values and the peak memory from a worker process to the main one."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_initialized():
        peak = torch.cuda.max_memory_allocated()
    os.write(ANSWERS, (json.dumps(values | {"peak_bytes": peak}) + "\n").encode())


def wait_for_turn() -> None:
    """Wait in a worker process until the main one asks for a step; exit if the main one has ended."""
    if not sys.stdin.readline():
        os._exit(0)


def work(name: str, task: Task) -> None:
    """A worker process: takes a step for every line on its standard input, and answers with its figures."""
    global ANSWERS
    ANSWERS = os.dup(1)
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    program = PROGRAMS[name](task)
    if name.startswith("trl"):
        next(program)  # never returns: the trainer's callback waits and answers
    answer_with(next(program))
    while True:
        wait_for_turn()
        answer_with(next(program))


def start(name: str, task: Task) -> subprocess.Popen:
    """Start a worker process, and wait until it is set up."""
    environment = dict(os.environ)
    if name == "ours" and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & environment.keys():
        environment["GOMP_SPINCOUNT"] = "1000"  # as src/threads.py does, before torch loads
    worker = subprocess.Popen(
        [sys.executable, __file__, "--worker", name, json.dumps(dataclasses.asdict(task))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        text=True,
    )
    read_answer(worker)
    return worker


def read_answer(worker: subprocess.Popen) -> dict:
    assert worker.stdout is not None
    return json.loads(worker.stdout.readline())


def take_step(worker: subprocess.Popen) -> dict:
    """Let a worker take a step, and return its answer."""
    assert worker.stdin is not None
    worker.stdin.write("step\n")
    worker.stdin.flush()
    return read_answer(worker)


def summarize(steps: list[dict], first: list[dict]) -> dict:
    """Medians over a program's steps, and over the ratios of their seconds to the first program's.

    The update of a program that does not measure it is the rest of the step.
    """

    def median(key: str) -> float:
        return statistics.median(step[key] for step in steps)

    phases = [dict(step["phases"]) for step in steps]
    for seconds, step in zip(phases, steps, strict=True):
        seconds.setdefault("update", step["seconds"] - sum(seconds.values()))
    summary = {
        "seconds": median("seconds"),
        "phases": {name: statistics.median(p.get(name, 0.0) for p in phases) for name in phases[0]},
        "tokens": median("tokens"),
        "peak_bytes": steps[-1]["peak_bytes"],
        "steps": [step["seconds"] for step in steps],
    }
    if "sampler_gap" in steps[0]:
        summary["sampler_gap"] = median("sampler_gap")
    # Ratios within each round, because the machine's speed drifts.
    ratios = [step["seconds"] / other["seconds"] for step, other in zip(steps, first, strict=True)]
    return summary | {"times": statistics.median(ratios)}


def show(summaries: dict[str, dict]) -> None:
    """Print a row per program."""
    phases = ("generate", "verify", "reference", "update")
    table = Table("", "step, s", "times", *phases, "tokens", "tokens/s", "peak GB")
    for name, summary in summaries.items():
        table.add_row(
            name,
            f"{summary['seconds']:.1f}",
            f"{summary['times']:.2f}",
            *(f"{summary['phases'].get(phase, 0.0):.2f}" for phase in phases),
            f"{summary['tokens']:.0f}",
            f"{summary['tokens'] / summary['seconds']:.0f}",
            f"{summary['peak_bytes'] / 1e9:.1f}",
        )
    Console(width=120).print(table)


def main(
    programs: tuple[Program, ...] = ("ours", "trl", "trl-fast", "plain"),
    tokens: int = 64,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    device: Literal["cpu", "cuda"] = "cpu",
    repetitions: int = 5,
    data: str = str(ROOT / "data" / "dummy_math_tasks.jsonl"),
    model: str = "embedded",
    output: Path | None = None,
) -> None:
    """Let the programs take steps in turns, and print medians.

    Args:
        programs: The programs to compare; ratios are to the first.
        tokens: Tokens of each completion; 0 lets completions end by themselves, after at most 64.
        dtype: What the programs compute in.
        device: Where they compute; the plain loop only knows the CPU.
        repetitions: Steps per program, after a warm-up step.
        data: A file of problems; the first 8 are used.
        model: A model, named as for train.py's --model-name.
        output: File for the figures as JSON.
    """
    task = Task(data, model, tokens, dtype, device)
    workers: dict[str, subprocess.Popen] = {name: start(name, task) for name in programs}
    runs: dict[str, Callable[[], dict]] = {
        name: functools.partial(take_step, worker) for name, worker in workers.items()
    }
    rounds = in_turns(runs, repetitions, verbose=True)
    for worker in workers.values():
        worker.kill()
    steps = {name: [answer | {"seconds": s} for s, answer in timed] for name, timed in rounds.items()}
    summaries = {name: summarize(timed, steps[programs[0]]) for name, timed in steps.items()}
    show(summaries)
    if output:
        about = dict(
            machine=platform.platform(),
            torch=torch.__version__,
            threads=torch.get_num_threads(),
            tokens=tokens,
            dtype=dtype,
        )
        output.write_text(json.dumps(about | summaries, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2], Task(**json.loads(sys.argv[3])))
    else:
        tyro.cli(main)
