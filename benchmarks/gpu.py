"""Measure the CUDA path on one GPU, without a network: python benchmarks/gpu.py SUBCOMMAND [--help]

    probe     versions, memory and matrix-product rates, and the attention kernels that PyTorch picks
    decode    seconds per token of the decoder, beside the time to read the weights and the cache
    gap       log-probs of the sampler against those of training, and both against float32
    update    reference and update passes: tokens/s, model FLOP utilization, peak memory beside the plan
    oom       gradients after a backward pass that really ran out of memory, against those without
    reward    the 7B reward model on the card, and offloaded
    step      a whole step, beside TRL's GRPOTrainer
    count     bytes, operations and kernels of a decode step and of an update pass; needs no GPU
    train     train.py itself: TinyLlama with a 7B reward model, its plan beside what nvidia-smi says

Models are random, with the configurations of TinyLlama-1.1B-Chat and AceMath-7B-RM. Every subcommand prints
one line of JSON per result, and takes at most a few minutes on an H100.
"""

import json
import os
import re
import shutil
import string
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import tyro
from tokenizers import Tokenizer, decoders, pre_tokenizers  # type: ignore[import-untyped]
from tokenizers import models as tokenizer_models
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import train as trainer  # noqa: E402
from benchmarks.memory import ACEMATH_RM, TINYLLAMA  # noqa: E402
from src import models  # noqa: E402
from src.engine import sampler, static_decoder  # noqa: E402
from src.engine.logprobs import completion_log_probs, micro_batches  # noqa: E402
from src.engine.master_weights import MasterWeights  # noqa: E402
from src.engine.memory import BatchSize  # noqa: E402
from src.engine.memory_plan import Plan  # noqa: E402
from src.engine.model_size import measure  # noqa: E402
from src.engine.sampler import Samples, Sampling  # noqa: E402
from src.grpo import UpdateSettings  # noqa: E402
from src.placement import set_up_cuda  # noqa: E402
from src.run.checkpoint import TrainingState  # noqa: E402

CUDA = torch.device("cuda")
QUESTIONS, GROUP, PROMPT, COMPLETION = 8, 8, 42, 470  # the default step at full length
TEMPERATURE = 0.8
# TinyLlama-Chat's template
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def report(name: str, **figures: object) -> None:
    """Print a result as one line of JSON."""
    rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in figures.items()}
    print(json.dumps({"name": name, **rounded}), flush=True)


def seconds(run: Callable[[], object], repetitions: int = 3) -> float:
    """Seconds that the fastest of several runs takes, up to its last kernel."""
    times = []
    for _ in range(repetitions):
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)


def make_policy(dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """A random TinyLlama on the GPU in float32, or rounded to `dtype` by `MasterWeights`.

    The head's weights are four times as large as usual, so that the distributions are as peaked as real ones.
    """
    torch.manual_seed(0)
    with CUDA:
        policy = AutoModelForCausalLM.from_config(TINYLLAMA, dtype=torch.float32)
    policy.lm_head.weight.data *= 4
    policy.get_input_embeddings().padding_idx = None
    return policy.eval()


def make_prompts(questions: int = QUESTIONS, tokens: int = PROMPT) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, 32_000, (questions, tokens), generator=generator).tolist()


def make_samples(mixed: bool) -> Samples:
    """64 random completions of full length or, if mixed, of 20 to 470 tokens; with made-up log-probs."""
    generator = torch.Generator().manual_seed(1)
    batch, width = QUESTIONS * GROUP, PROMPT + COMPLETION
    lengths = torch.full((batch,), COMPLETION)
    if mixed:
        lengths = torch.randint(20, COMPLETION + 1, (batch,), generator=generator)
    column = torch.arange(width)
    real = column < PROMPT + lengths[:, None]  # (B, T)
    ids = torch.randint(3, 32_000, (batch, width), generator=generator)
    ids[:, :PROMPT] = torch.tensor(make_prompts()).repeat_interleave(GROUP, 0)
    actions = (real & (column >= PROMPT))[:, 1:]
    log_probs = torch.where(actions, -9.0, 0.0)
    done = torch.zeros(batch, dtype=torch.bool)
    samples = Samples(ids, real, actions, log_probs, done, GROUP)
    return samples.to(CUDA)


# ----------------------------------------------------------------------------------------------------------
# The card


def probe() -> None:
    """Versions, the card's rates, and the cost of attention at shapes seen for the first time."""
    properties = torch.cuda.get_device_properties(0)
    block = torch.ones(2**32, dtype=torch.uint8, device=CUDA)
    copying = seconds(block.clone)
    del block
    a, b = (torch.randn(8192, 8192, device=CUDA, dtype=torch.bfloat16) for _ in range(2))
    a @ b
    product = seconds(lambda: a @ b)
    report(
        "card",
        gpu=properties.name,
        memory_gb=properties.total_memory / 1e9,
        torch=torch.__version__,
        cudnn=torch.backends.cudnn.version(),
        copy_tb_per_s=2 * 2**32 / copying / 1e12,
        product_tflop_per_s=2 * 8192**3 / product / 1e12,
    )
    for cudnn in (True, False):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        for masked in (True, False):
            attention_at_new_shapes(cudnn, masked)
    torch.backends.cuda.enable_cudnn_sdp(True)


def attention_at_new_shapes(cudnn: bool, masked: bool) -> None:
    """Time forward and backward of attention at 6 lengths, on the first and on the second call."""
    first, second, kernels = [], [], set()
    for length in range(500 + 7 * masked + 14 * cudnn, 800, 50):
        shape = (4, 32, length, 64)
        q, k, v = (torch.randn(shape, device=CUDA, dtype=torch.bfloat16, requires_grad=True) for _ in "qkv")
        mask = None
        if masked:
            allowed = torch.ones(4, 1, length, length, dtype=torch.bool, device=CUDA).tril()
            mask = torch.zeros(allowed.shape, dtype=q.dtype, device=CUDA).masked_fill(
                ~allowed, torch.finfo(q.dtype).min
            )

        def run(q=q, k=k, v=v, mask=mask):
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None
            )
            out.sum().backward()

        choice = torch._fused_sdp_choice(q, k, v, mask, 0.0, mask is None)
        kernels.add(str(torch.nn.attention.SDPBackend(choice)).removeprefix("SDPBackend."))
        first.append(seconds(run, 1))
        second.append(seconds(run, 1))
    ms = [1e3 * sum(times) / len(times) for times in (first[1:], second[1:])]
    report(
        "attention", cudnn=cudnn, masked=masked, kernels=sorted(kernels), first_call_ms=ms[0], again_ms=ms[1]
    )


# ----------------------------------------------------------------------------------------------------------
# Sampling


def decode(tokens: int = COMPLETION, rows: int = QUESTIONS * GROUP) -> None:
    """Time the decoder on the default step, 64 completions of full length."""
    policy = make_policy()
    MasterWeights(policy, torch.bfloat16)
    torch.cuda.empty_cache()
    prompts = make_prompts(rows // GROUP)
    generator = torch.Generator(CUDA).manual_seed(0)
    sampling = Sampling(TEMPERATURE, 1.0, PROMPT + tokens, None, [])

    def run() -> Samples:
        return sampler.sample(policy, prompts, GROUP, sampling, generator)

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    compiling = seconds(run, 1)
    per_token = seconds(run) / tokens
    weights = (
        2.0 * sum(w.numel() for w in policy.parameters()) - 2.0 * policy.model.embed_tokens.weight.numel()
    )
    cache = rows * 2 * 2.0 * 22 * 4 * 64 * (PROMPT + tokens / 2)
    report(
        "decode",
        rows=rows,
        tokens=tokens,
        first_s=compiling,
        ms_per_token=1e3 * per_token,
        tokens_per_s=rows / per_token,
        roofline_ms=(weights + cache) / 3.0e12 * 1e3,
        of_roofline=(weights + cache) / 3.0e12 / per_token,
        pool_gb=(torch.cuda.memory_reserved() - before) / 1e9,
        peak_gb=torch.cuda.max_memory_allocated() / 1e9,
    )
    decode_parts(policy, prompts, sampling)


def decode_parts(policy: PreTrainedModel, prompts: list[list[int]], sampling: Sampling) -> None:
    """Time reading the prompts, and a decode step without choosing tokens."""
    decoder = sampler.make_decoder(policy, len(prompts) * GROUP, sampling.max_length)
    with torch.no_grad():
        reading = seconds(lambda: decoder.prefill(prompts, GROUP, 0))
        decoder.prefill(prompts, GROUP, 0)
        token = torch.full((len(prompts) * GROUP,), 5, device=CUDA)
        decoder.step(token)

        count = (sampling.max_length - PROMPT - 1) // 3  # the cache has room for three repetitions

        def steps():
            for _ in range(count):
                decoder.step(token)

        step = seconds(steps) / count
    report("decode parts", prefill_ms=1e3 * reading, step_ms=1e3 * step)


def gap(tokens: int = 200) -> None:
    """Compare log-probs from sampling, from training, and from float32 weights with the same values."""
    policy = make_policy()
    MasterWeights(policy, torch.bfloat16)
    sampling = Sampling(TEMPERATURE, 1.0, PROMPT + tokens, None, [])
    generator = torch.Generator(CUDA).manual_seed(0)
    samples = sampler.sample(policy, make_prompts(), GROUP, sampling, generator)
    mask = samples.action_mask

    @torch.no_grad()
    def training(model: PreTrainedModel) -> torch.Tensor:
        log_probs = torch.zeros_like(samples.log_probs)
        for part in micro_batches(model, samples, torch.arange(len(mask)), 8):
            log_probs[part.rows, : part.width] = completion_log_probs(model, samples, part, TEMPERATURE)
        return log_probs[mask]

    sampled, trained = samples.log_probs[mask], training(policy)
    for weight in policy.parameters():
        weight.data = weight.data.float()
    policy.config.dtype = torch.float32
    static_decoder.release()  # its cache has the old dtype
    exact = training(policy)
    pairs = {"sampler_training": (sampled, trained), "sampler_float32": (sampled, exact),
             "training_float32": (trained, exact)}  # fmt: skip
    figures = {f"{name}_mean": (a - b).abs().mean().item() for name, (a, b) in pairs.items()}
    figures |= {f"{name}_max": (a - b).abs().max().item() for name, (a, b) in pairs.items()}
    report("gap", entropy=-sampled.mean().item(), **figures)
    greedy = sampling.greedy()
    fast = sampler.sample(policy, make_prompts(), 1, greedy, None).sequence_ids
    general = sampler.GeneralDecoder(policy)
    original, sampler.make_decoder = sampler.make_decoder, lambda *_: general
    slow = sampler.sample(policy, make_prompts(), 1, greedy, None).sequence_ids
    sampler.make_decoder = original
    report("greedy in float32", equal_tokens=(fast == slow).float().mean().item())


# ----------------------------------------------------------------------------------------------------------
# Updating


def update(micro_batch: int = 8, checkpointing: bool = False) -> None:
    """Time the reference and the update on 64 completions of full length, and of mixed lengths."""
    policy = make_policy()
    master = MasterWeights(policy, torch.bfloat16)
    reference = models.make_reference(policy, None)
    if checkpointing:
        models.checkpoint_activations(policy)
    optimizer = torch.optim.AdamW(master.parameters, lr=1e-6, weight_decay=0.0, fused=True)
    order = torch.Generator().manual_seed(0)
    state = TrainingState(policy, make_tokenizer(), master, optimizer, {"order": order})
    settings = UpdateSettings(
        train_batch_size=64, epochs_per_step=1, temperature=TEMPERATURE, kl_weight=0.01, clip_eps=0.2,
        max_norm=1.0, loss_normalizer="token", max_length=PROMPT + COMPLETION, max_new_tokens=COMPLETION,
    )  # fmt: skip
    body = sum(w.numel() for w in policy.parameters()) - policy.model.embed_tokens.weight.numel()
    size = BatchSize(micro_batch)
    for mixed in (False, True):
        samples = make_samples(mixed)
        advantages = torch.linspace(-1, 1, len(samples.lengths))
        parts = micro_batches(policy, samples, torch.arange(len(advantages)), size.size)
        tokens = int(samples.lengths.sum()) + QUESTIONS * PROMPT
        ref_log_probs = trainer.reference_log_probs(reference, samples, TEMPERATURE, size)
        take = partial(trainer.update, policy, state, samples, advantages, ref_log_probs, settings, size)
        first = seconds(take, 1)
        torch.cuda.reset_peak_memory_stats()
        updating = seconds(take, 2)
        peak = torch.cuda.max_memory_allocated()
        referring = seconds(partial(trainer.reference_log_probs, reference, samples, TEMPERATURE, size), 2)
        for p in master.parameters:
            p.grad = torch.zeros_like(p)
        stepping = seconds(lambda: master.step(optimizer), 2)
        master.zero_grad()
        report(
            "update", mixed=mixed, micro_batch=size.size, passes=len(parts), tokens=tokens, first_s=first,
            update_s=updating, reference_s=referring, optimizer_s=stepping,
            mfu=6.0 * body * tokens / (updating - stepping) / 989e12, peak_gb=peak / 1e9,
        )  # fmt: skip
    plan = Plan(
        measure(policy_in_bfloat16(), "cuda"), "cuda", 64, GROUP, micro_batch, PROMPT, COMPLETION, True
    )
    report("plan", max_gb=plan.max_bytes() / 1e9, line=plan.describe(80e9))


def policy_in_bfloat16() -> PreTrainedModel:
    """TinyLlama without its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(TINYLLAMA, dtype=torch.bfloat16)


def oom() -> None:
    """Let memory really run out in a backward pass, and compare the gradients with those without."""
    policy = make_policy()
    master = MasterWeights(policy, torch.bfloat16)
    samples = make_samples(mixed=False)
    settings = UpdateSettings(
        train_batch_size=16, epochs_per_step=1, temperature=TEMPERATURE, kl_weight=0.0, clip_eps=0.2,
        max_norm=1.0, loss_normalizer="token", max_length=PROMPT + COMPLETION, max_new_tokens=COMPLETION,
    )  # fmt: skip
    weights = torch.where(samples.action_mask, 1e-4, 0.0)
    advantages = torch.linspace(-1, 1, len(weights), device=CUDA)

    def gradients(size: int) -> tuple[torch.Tensor, int]:
        batch = BatchSize(size)
        rows = torch.arange(16)
        given = (policy, master, samples, advantages, None, weights, rows, settings)
        batch.fit(lambda n: trainer.accumulate_gradients(*given, n))
        found = torch.cat([p.grad.flatten() for p in master.parameters if p.grad is not None]).cpu()
        master.zero_grad()
        return found, batch.size

    expected, _ = gradients(4)
    again, _ = gradients(4)
    report("oom", limit_gb=None, size=4, relative_error=((again - expected).norm() / expected.norm()).item())
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.reset_peak_memory_stats()
    gradients(8)
    peak = torch.cuda.max_memory_allocated()
    for share in (0.98, 0.95, 0.9, 0.85):
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(share * peak / total)
        try:
            found, size = gradients(8)
        except torch.OutOfMemoryError as failure:
            report("oom", limit_gb=share * peak / 1e9, failed=str(failure)[:200])
            continue
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        error = (found - expected).norm() / expected.norm()
        report("oom", limit_gb=share * peak / 1e9, size=size, relative_error=error.item())


# ----------------------------------------------------------------------------------------------------------
# The reward model, and train.py


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with 32,000 entries, so that a random completion becomes text of its length."""
    letters = string.ascii_letters + string.digits
    merges = [(a, b) for a in letters for b in letters]
    merges += [(a + b, c) for a, b in merges for c in letters]
    vocabulary = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = merges[: 32_000 - len(vocabulary)]
    vocabulary += [a + b for a, b in merges]
    bpe = tokenizer_models.BPE({token: i for i, token in enumerate(vocabulary)}, merges=merges)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = dict(bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE, **special)


def save_policy(folder: Path) -> str:
    policy = make_policy()
    MasterWeights(policy, torch.bfloat16)  # rounds the policy in place
    policy.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def save_reward_model(folder: Path) -> str:
    """A random AceMath-7B-RM in bfloat16."""
    config = ACEMATH_RM.__class__(**ACEMATH_RM.to_dict() | {"num_labels": 1, "pad_token_id": 2})
    torch.manual_seed(0)
    with CUDA:
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def memory_folder() -> Path:
    """A new folder in memory, because models of 15 GB would take long on a disk."""
    return Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))


def reward(offload: bool = True) -> None:
    """Time the reward model on 64 responses of 470 tokens, on the card and offloaded."""
    from src.reward_model import AceRewardModel

    folder = memory_folder()
    try:
        started = time.perf_counter()
        path = save_reward_model(folder)
        torch.cuda.empty_cache()
        report("reward model saved", seconds=time.perf_counter() - started)
        texts = make_tokenizer().batch_decode(make_samples(mixed=False).completion_ids())
        for offloaded in (False, True)[: 1 + offload]:
            started = time.perf_counter()
            model = AceRewardModel(path, CUDA, torch.bfloat16, offload=offloaded)
            loading = time.perf_counter() - started
            tokens = sum(len(model.encode("What is 7 * 3?", text)) for text in texts)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            score = partial(model.score_texts, "What is 7 * 3?", texts)
            first, scoring = seconds(score, 1), seconds(score, 2)
            added = torch.cuda.max_memory_allocated() - before
            report(
                "reward", offloaded=offloaded, load_s=loading, tokens=tokens, first_s=first, score_s=scoring,
                mfu=2 * 6.53e9 * tokens / scoring / 989e12, added_gb=added / 1e9,
            )  # fmt: skip
            del model, score
            torch.cuda.empty_cache()
    finally:
        shutil.rmtree(folder)


class UsedMemory(threading.Thread):
    """Watches the GPU memory that is in use, in bytes, until the program ends."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak = 0.0

    def run(self) -> None:
        command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while True:
            self.peak = max(self.peak, float(subprocess.check_output(command)) * 2**20)
            time.sleep(0.2)


def show_output(command: list[str]) -> tuple[str, int]:
    """Run a command and print its lines with the seconds so far. Returns its output and exit status."""
    started = time.perf_counter()
    with subprocess.Popen(
        command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    ) as ran:  # fmt: skip
        assert ran.stdout is not None
        lines = []
        for line in ran.stdout:
            print(f"{time.perf_counter() - started:5.1f} s  {line[:300].rstrip()}", flush=True)
            lines.append(line)
    return "".join(lines), ran.returncode


def step(programs: tuple[str, ...] = ("ours", "trl", "trl-fast"), repetitions: int = 1) -> None:
    """Compare a whole step with TRL's GRPOTrainer, through step.py: 64 completions of full length."""
    folder = memory_folder()
    try:
        policy = save_policy(folder / "tinyllama")
        torch.cuda.empty_cache()
        command = [
            sys.executable,
            str(ROOT / "benchmarks" / "step.py"),
            "--device",
            "cuda",
            "--model",
            policy,
        ]
        command += ["--tokens", str(COMPLETION), "--repetitions", str(repetitions), "--programs", *programs]
        show_output(command)
    finally:
        shutil.rmtree(folder)


def train(steps: int = 3, reward_model: bool = True, flags: str = "") -> None:
    """Run train.py with a random TinyLlama, and with a random 7B reward model if wanted.

    Args:
        steps: Steps to train.
        reward_model: Whether to train with a random AceMath-7B-RM.
        flags: More flags of train.py, in one string.
    """
    folder = memory_folder()
    try:
        policy = save_policy(folder / "tinyllama")
        judge = save_reward_model(folder / "acemath") if reward_model else "none"
        torch.cuda.empty_cache()
        used = UsedMemory()
        used.start()
        command = [sys.executable, str(ROOT / "train.py"), "--model-name", policy, "--max-steps", str(steps)]
        command += ["--reward-model-name", judge, "--output", str(folder), "--run-name", "run"]
        command += ["--keep-checkpoints", "1", *flags.split()]
        started = time.perf_counter()
        output, status = show_output(command)
        planned = re.search(r"up to ([\d.]+) of", output)
        report(
            "train", rc=status, seconds=time.perf_counter() - started, flags=flags, peak_gb=used.peak / 1e9,
            own_gb=torch.cuda.memory_reserved() / 1e9 + 0.5, planned_gb=planned and float(planned[1]),
        )  # fmt: skip
        for line in (folder / "run" / "metrics.jsonl").read_text().splitlines():
            metrics = json.loads(line)
            shown = ("time/", "policy/sampler_gap", "rollout/", "policy/micro")
            report("step", **{k: v for k, v in metrics.items() if k.startswith(shown)})
    finally:
        shutil.rmtree(folder)


def count() -> None:
    """Count what a decode step and an update pass of the default step do, without a GPU."""
    from benchmarks import gpu_counts  # here, because it loads fake tensors

    rows, columns = QUESTIONS * GROUP, PROMPT + COMPLETION
    traffic, ideal = gpu_counts.count_decode(rows, columns)
    total = traffic.total
    report(
        "count decode", rows=rows, columns=columns, gb=total.bytes / 1e9,
        of_weights_and_cache=total.bytes / ideal, kernels=total.launches, host_reads=traffic.reads,
        roofline_ms=1e3 * total.seconds,
    )  # fmt: skip
    for completions in (GROUP, 2 * GROUP):
        traffic, utilization = gpu_counts.count_update(completions, completions, PROMPT, COMPLETION)
        total = traffic.total
        report(
            "count update", completions=completions, gb=total.bytes / 1e9, operations=total.operations,
            kernels=total.launches, host_reads=traffic.reads, roofline_s=total.seconds, mfu=utilization,
            in_products=traffic.kernels["mm"].seconds / total.seconds,
        )  # fmt: skip


if __name__ == "__main__":
    set_up_cuda()
    tyro.extras.subcommand_cli_from_dict(
        {f.__name__: f for f in (probe, decode, gap, update, oom, reward, count, train, step)}
    )
