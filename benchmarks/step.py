"""One GRPO step here, in TRL's GRPOTrainer and in a plain loop: python benchmarks/step.py [--help]

The embedded model, 8 questions x 8 completions, verifier reward, KL term on, one optimizer step in all, computed in bfloat16 as
on processors with matrix units (AMX), or with `--dtype float32` as on those without. Each program runs in a process of its own
and takes its steps when told to, in turns, so that they meet the same machine. With `--tokens` the end token is suppressed, so
that all do the same work; with `--tokens 0` completions end where they end (64 tokens at most).

- ours: train.py's own functions. Float32 weights are trained, ones of the dtype compute.
- trl: GRPOTrainer as it comes, which trains float32 weights too and computes in bfloat16 by autocast.
- trl-fast: GRPOTrainer with weights in the dtype and without gradient checkpointing: faster, but bfloat16 rounds small updates
  away.
- plain: what a first version looks like, after tiny-grpo: question by question, padded batches of 8, all logits, and gradient
  checkpointing as there.
- plain-kept: the same without gradient checkpointing, which fits in memory here.
"""

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
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeVar

import torch
import tyro
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
T = TypeVar("T")
ANSWERS: int  # where a worker writes, a descriptor
Q, G, LIMIT, TEMPERATURE, KL, LR = 8, 8, 64, 0.8, 0.01, 1e-6


class Phases:
    """Seconds of each part of a step."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str):
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def around(self, owner, method: str, name: str) -> None:
        """Count what a method of somebody else's object takes."""
        original = getattr(owner, method)

        def timed(*args, **kwargs):
            with self(name):
                return original(*args, **kwargs)

        setattr(owner, method, timed)


def problems(path: str):
    """The first Q problems of a file."""
    from train import read_prompts

    return read_prompts(path, "--data")[:Q]


def verdicts(verifier, questions: list[str], completions: list[str], answers: list[str]) -> list[float]:
    return [float(v["correct"]) for v in verifier.verify_batch(questions, completions, answers)]


# ----------------------------------------------------------------------------------------------------------------------
# The programs. Each yields after set-up, then after each step its phases, tokens and what it likes to say.


def ours(data: str, model: str, tokens: int, dtype: str = "bfloat16"):
    """train.py's own functions, as main() calls them."""
    import train
    from src import models
    from src.grpo import compute_advantages
    from src.master_weights import MasterWeights
    from src.math_verifier import MathVerifier
    from src.memory import bound_product_cache, keep_freed_memory
    from src.sampler import sample

    keep_freed_memory()
    bound_product_cache()
    device = torch.device("cpu")
    tokenizer, policy = models.load_tokenizer(model), models.load_policy(model, device)
    master = MasterWeights(policy, getattr(torch, dtype))
    reference = models.frozen_copy(policy)
    optimizer = torch.optim.AdamW(master.parameters, lr=LR, weight_decay=0.0, fused=True)
    verifier, order = MathVerifier(), torch.Generator().manual_seed(0)
    todo = problems(data)
    prompt_ids = train.encode_prompts(tokenizer, todo, None, 2048)
    questions, answers = ([getattr(p, name) for p in todo for _ in range(G)] for name in ("question", "answer"))
    generator = torch.Generator().manual_seed(0)
    stop_ids = [] if tokens else models.stop_token_ids(policy, tokenizer)  # without stop ids every completion fills its limit
    phase = Phases()
    yield {}
    while True:
        phase.seconds = {}
        with phase("generate"):
            samples = sample(
                policy, prompt_ids, G, max_length=2048, max_new_tokens=tokens or LIMIT, temperature=TEMPERATURE, top_p=1.0,
                stop_ids=stop_ids, pad_id=tokenizer.pad_token_id, generator=generator,
            )  # fmt: skip
        with phase("verify"):
            right = verdicts(verifier, questions, train.decode(tokenizer, samples), answers)
        rewards = torch.tensor(right) + torch.linspace(0, 0.1, Q * G)  # no group without an advantage: all is computed
        advantages = compute_advantages(rewards, G, "batch")
        with phase("reference"):
            ref_log_probs = train.reference_log_probs(reference, samples, G, TEMPERATURE, 32)
        with phase("update"):
            metrics = train.update(
                policy, master, optimizer, samples, advantages, ref_log_probs, G, order, train_batch_size=Q * G,
                micro_batch_size=32, epochs_per_step=1, temperature=TEMPERATURE, kl_weight=KL, clip_eps=0.2, max_norm=1.0,
                loss_normalizer="token", max_completion_length=LIMIT,
            )  # fmt: skip
        made = sum(map(len, samples.completion_ids))
        yield {"phases": phase.seconds, "tokens": made, "sampler_gap": metrics["policy/sampler_gap"]}


def trl(data: str, model: str, tokens: int, dtype: str, settings: dict | None = None):
    """TRL's GRPOTrainer with its own settings, 8 completions a pass."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from src import models
    from src.math_verifier import MathVerifier

    verifier = MathVerifier()
    rows = [{"prompt": [{"role": "user", "content": p.question}], "answer": p.answer} for p in problems(data)]
    phase, made = Phases(), []
    said: list[int] = []

    def reward(prompts, completions, completion_ids, answer, **_):
        made.append(sum(map(len, completion_ids)))
        with phase("verify"):
            found = verdicts(verifier, [p[0]["content"] for p in prompts], [c[0]["content"] for c in completions], answer)
        return [r + 0.1 * i / len(found) for i, r in enumerate(found)]

    class Turns(TrainerCallback):
        """The trainer's loop cannot be stepped from outside: it waits here for its turn, and answers."""

        def on_step_begin(self, *_, **__):
            if not said:
                answer_with({})
            said.append(1)
            wait_for_turn()
            phase.seconds = {}
            made.clear()

        def on_step_end(self, *_, **__):
            answer_with({"phases": phase.seconds, "tokens": sum(made)})

    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(), num_generations=G, per_device_train_batch_size=8, gradient_accumulation_steps=Q * G // 8,
        max_completion_length=tokens or LIMIT, temperature=TEMPERATURE, beta=KL, learning_rate=LR, weight_decay=0.0, use_cpu=True,
        bf16=dtype == "bfloat16", save_strategy="no", report_to=[],
        max_steps=10_000, shuffle_dataset=False, disable_tqdm=True, logging_strategy="no",
        generation_kwargs={"min_new_tokens": tokens} if tokens else None, **(settings or {}),
    )  # fmt: skip
    trainer = GRPOTrainer(
        models.resolve(model, "--model-name"), reward_funcs=reward, args=config, train_dataset=Dataset.from_list(rows),
        processing_class=models.load_tokenizer(model), callbacks=[Turns()],
    )  # fmt: skip
    phase.around(trainer, "_generate", "generate")
    count_reference(trainer, phase)
    trainer.train()
    yield {}


def count_reference(trainer, phase: Phases) -> None:
    """Count as `reference` the log-probs that TRL's trainer computes while it scores completions, not those of its update."""
    in_scoring = []
    scoring, log_probs = trainer._generate_and_score_completions, trainer._get_per_token_logps_and_entropies

    def scored(*args, **kwargs):
        in_scoring.append(1)
        try:
            return scoring(*args, **kwargs)
        finally:
            in_scoring.pop()

    def log_probs_of(*args, **kwargs):
        if not in_scoring:
            return log_probs(*args, **kwargs)
        with phase("reference"):
            return log_probs(*args, **kwargs)

    trainer._generate_and_score_completions, trainer._get_per_token_logps_and_entropies = scored, log_probs_of


def trl_fast(data: str, model: str, tokens: int, dtype: str):
    """The fastest of TRL's settings here."""
    return trl(data, model, tokens, dtype, {"model_init_kwargs": {"dtype": dtype}, "gradient_checkpointing": False})


def generate_group_by_group(policy, ids: torch.Tensor, mask: torch.Tensor, pad: int, tokens: int) -> torch.Tensor:
    """Prompts (B, P), padded on the left, with their completions behind them, padded on the right to the longest: (B, T)."""
    parts = [
        policy.generate(
            ids[part], attention_mask=mask[part], do_sample=True, temperature=TEMPERATURE, top_k=0, top_p=1.0, pad_token_id=pad,
            max_new_tokens=tokens or LIMIT, min_new_tokens=tokens or None,
        )
        for part in torch.arange(Q * G).split(G)
    ]  # fmt: skip
    out = torch.full((Q * G, max(part.shape[1] for part in parts)), pad)
    for i, part in enumerate(parts):
        out[i * G : (i + 1) * G, : part.shape[1]] = part
    return out


def full_log_probs(model, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Log-probs (b, T-1) of the tokens (b, T) after the first, by way of all logits at once."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    return (logits[:, :-1].float() / TEMPERATURE).log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]


def plain(data: str, model: str, tokens: int, dtype: str = "bfloat16", checkpointing: bool = True):
    """Generate question by question, padded batches, full logits, weights of the dtype stepped as they are."""
    import copy

    from transformers import AutoModelForCausalLM

    from src import models
    from src.math_verifier import MathVerifier
    from train import encode_prompts

    tokenizer = models.load_tokenizer(model)
    policy = AutoModelForCausalLM.from_pretrained(models.resolve(model, "--model-name"), dtype=getattr(torch, dtype)).eval()
    reference = copy.deepcopy(policy).requires_grad_(False)
    if checkpointing:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LR, weight_decay=0.0)
    verifier, todo = MathVerifier(), problems(data)
    prompts = [ids for ids in encode_prompts(tokenizer, todo, None, 2048) for _ in range(G)]
    longest, pad = max(map(len, prompts)), tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    questions, answers = ([getattr(p, name) for p in todo for _ in range(G)] for name in ("question", "answer"))

    yield {}
    while True:
        phase = Phases()
        with phase("generate"), torch.no_grad():
            out = generate_group_by_group(policy, ids, mask, pad, tokens)
        new = out[:, longest:]
        ended = (new == tokenizer.eos_token_id).cumsum(1)
        real = torch.ones_like(new) if tokens else ((ended - (new == tokenizer.eos_token_id).long()) == 0).long()
        attention = torch.cat([mask, real], dim=1)
        actions = torch.cat([torch.zeros_like(mask), real], dim=1)[:, 1:]
        with phase("verify"):
            rewards = torch.tensor(verdicts(verifier, questions, tokenizer.batch_decode(new, skip_special_tokens=True), answers))
        rewards = (rewards + torch.linspace(0, 0.1, Q * G)).view(Q, G)
        advantages = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
        parts = torch.arange(Q * G).split(8)
        with phase("reference"), torch.no_grad():
            old = [full_log_probs(policy, out[part], attention[part]) for part in parts]
            frozen = [full_log_probs(reference, out[part], attention[part]) for part in parts]
        with phase("update"):
            policy.train()  # or transformers would not checkpoint
            for part, before, base in zip(parts, old, frozen, strict=True):
                now = full_log_probs(policy, out[part], attention[part])
                ratio = (now - before).exp()
                advantage = advantages[part][:, None]
                surrogate = torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
                kl = (base - now).exp() - (base - now) - 1
                (((KL * kl - surrogate) * actions[part]).sum() / actions.sum()).backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            policy.eval()
        yield {"phases": phase.seconds, "tokens": int(real.sum())}


def plain_kept(data: str, model: str, tokens: int, dtype: str):
    """The plain loop without gradient checkpointing."""
    return plain(data, model, tokens, dtype, checkpointing=False)


PROGRAMS: dict[str, Callable] = {"ours": ours, "trl": trl, "trl-fast": trl_fast, "plain": plain, "plain-kept": plain_kept}


# ----------------------------------------------------------------------------------------------------------------------
# Turns


def in_turns(runs: dict[str, Callable[[], T]], repetitions: int, say: bool = False) -> dict[str, list[tuple[float, T]]]:
    """Seconds and answer of each run of each program, which meet the same machine; one round before them warms up."""
    done: dict[str, list[tuple[float, T]]] = {name: [] for name in runs}
    for repetition in range(repetitions + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            answer = run()
            seconds = time.perf_counter() - started
            if say:
                print(f"{name} {repetition or 'warm-up'}: {seconds:.1f} s", flush=True)
            if repetition:
                done[name].append((seconds, answer))
    return done


def answer_with(values: dict) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    os.write(ANSWERS, (json.dumps(values | {"peak_bytes": peak}) + "\n").encode())


def wait_for_turn() -> None:
    if not sys.stdin.readline():
        os._exit(0)


def work(name: str, data: str, model: str, tokens: int, dtype: str) -> None:
    """A worker process: a step for every line that comes in, and its figures for an answer."""
    global ANSWERS
    ANSWERS = os.dup(1)
    os.dup2(2, 1)  # whatever the libraries print
    program = PROGRAMS[name](data, model, tokens, dtype)
    if name.startswith("trl"):
        next(program)  # takes its turns itself
    answer_with(next(program))
    while True:
        wait_for_turn()
        answer_with(next(program))


def start(name: str, data: str, model: str, tokens: int, dtype: str) -> subprocess.Popen:
    """A process at `work`, set up and waiting for its turn."""
    worker = subprocess.Popen(
        [sys.executable, __file__, "--worker", name, data, model, str(tokens), dtype],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    answer_of(worker)
    return worker


def answer_of(worker: subprocess.Popen) -> dict:
    assert worker.stdout is not None
    return json.loads(worker.stdout.readline())


def step_of(worker: subprocess.Popen) -> dict:
    """Let it take a step, and read its answer."""
    assert worker.stdin is not None
    worker.stdin.write("step\n")
    worker.stdin.flush()
    return answer_of(worker)


def figures(steps: list[dict], first: list[dict]) -> dict:
    """Medians over a program's steps, and how many times the first program's seconds they take.

    A program that does not say what its update takes gets what the other phases leave of a step.
    """

    def median(key: str) -> float:
        return statistics.median(step[key] for step in steps)

    phases = [dict(step["phases"]) for step in steps]
    for of_step, step in zip(phases, steps, strict=True):
        of_step.setdefault("update", step["seconds"] - sum(of_step.values()))
    result = {
        "seconds": median("seconds"),
        "phases": {p: statistics.median(of_step.get(p, 0.0) for of_step in phases) for p in phases[0]},
        "tokens": median("tokens"),
        "peak_bytes": steps[-1]["peak_bytes"],
        "steps": [step["seconds"] for step in steps],
    }
    if "sampler_gap" in steps[0]:
        result["sampler_gap"] = median("sampler_gap")
    # Of each round: machines drift.
    result["times"] = statistics.median(a["seconds"] / b["seconds"] for a, b in zip(steps, first, strict=True))
    return result


def main(
    programs: tuple[Literal["ours", "trl", "trl-fast", "plain", "plain-kept"], ...] = ("ours", "trl", "trl-fast", "plain"),
    tokens: int = 64,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    repetitions: int = 5,
    data: str = str(ROOT / "data" / "dummy_math_tasks.jsonl"),
    model: str = "embedded",
    output: Path | None = None,
) -> None:
    """Take steps in turns and print medians.

    Args:
        programs: Which to compare; ratios are to the first.
        tokens: Of each completion; 0 lets them end, after 64 at the latest.
        dtype: That they compute in.
        repetitions: Steps of each, after one to warm up.
        data: Problems; the first 8 are taken.
        model: As --model-name of train.py takes it.
        output: File for the figures as JSON.
    """
    workers = {name: start(name, data, model, tokens, dtype) for name in programs}
    timed = in_turns({name: functools.partial(step_of, worker) for name, worker in workers.items()}, repetitions, say=True)
    steps = {name: [answer | {"seconds": seconds} for seconds, answer in rounds] for name, rounds in timed.items()}
    for worker in workers.values():
        worker.kill()
    of_program = {name: figures(steps[name], steps[programs[0]]) for name in programs}
    table = Table("", "step, s", "times", "generate", "verify", "reference", "update", "tokens", "tokens/s", "peak GB")
    for name, of in of_program.items():
        table.add_row(
            name,
            f"{of['seconds']:.1f}",
            f"{of['times']:.2f}",
            *(f"{of['phases'].get(p, 0.0):.2f}" for p in ("generate", "verify", "reference", "update")),
            f"{of['tokens']:.0f}",
            f"{of['tokens'] / of['seconds'] if of['tokens'] else 0:.0f}",
            f"{of['peak_bytes'] / 1e9:.1f}",
        )
    Console(width=120).print(table)
    if output:
        about = dict(
            machine=platform.platform(), torch=torch.__version__, threads=torch.get_num_threads(), tokens=tokens, dtype=dtype
        )
        output.write_text(json.dumps(about | of_program, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5]), sys.argv[6])
    else:
        tyro.cli(main)
