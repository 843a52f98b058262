"""What the default step's decode steps and update passes move and compute, counted without a GPU."""

from unittest import mock

import torch
from transformers import AutoModelForCausalLM

import train
from benchmarks.counting import PEAK_RATE, Traffic, count_traffic
from benchmarks.fake_gpu import META, fake_cuda, fake_model, meta_gpu, on_device
from benchmarks.memory import TINYLLAMA
from src import metrics
from src.engine.cuda_decoder import GraphDecoder
from src.engine.master_weights import MasterWeights
from src.engine.sampler import Samples
from src.grpo import UpdateSettings

GROUP = 8


def count_decode(rows: int, columns: int) -> tuple[Traffic, float]:
    """Count a decode step of TinyLlama whose cache is full.

    Returns:
        What it does, and the bytes of the weights and of the cache.
    """
    with fake_cuda(), torch.no_grad():
        model = fake_model(TINYLLAMA, AutoModelForCausalLM)
        decoder = GraphDecoder(model, rows, columns)
        decoder.prefill([[1] * 42] * (rows // GROUP), GROUP, 0)
        with count_traffic("cuda") as traffic:
            decoder.step(torch.zeros(rows, dtype=torch.long, device="cuda"))
    weights = 2.0 * sum(weight.numel() for weight in model.parameters())
    cache = sum(buffer.nbytes for buffer in decoder.buffers)
    return traffic, weights + cache


def make_samples(completions: int, prompt: int, completion: int) -> Samples:
    """Samples of full length, on the meta device."""
    length = prompt + completion
    ids, real = (torch.zeros(completions, length, dtype=dtype) for dtype in (torch.long, torch.bool))
    actions = torch.arange(length - 1).expand(completions, -1) >= prompt - 1
    log_probs = torch.zeros(completions, length - 1)
    samples = Samples(ids, ~real, actions, log_probs, real[:, 0], min(GROUP, completions))
    return on_device(samples, META)


def count_update(completions: int, micro_batch: int, prompt: int, completion: int) -> tuple[Traffic, float]:
    """Count the forward and backward passes of one optimizer step of TinyLlama.

    Returns:
        What they do, and the model FLOP utilization if every kernel takes as long as its roofline says:
        6 operations per weight and token, by what the data sheet of an H100 promises.
    """
    samples = make_samples(completions, prompt, completion)
    settings = UpdateSettings(
        train_batch_size=completions, epochs_per_step=1, temperature=0.8, kl_weight=0.01, clip_eps=0.2,
        max_norm=1.0, loss_normalizer="token", max_length=prompt + completion, max_new_tokens=None,
    )  # fmt: skip
    with meta_gpu(), mock.patch.object(metrics.LossSums, "of"):
        with META:
            policy = AutoModelForCausalLM.from_config(TINYLLAMA, dtype=torch.float32).eval()
        master = MasterWeights(policy, torch.bfloat16)
        advantages, zeros = torch.zeros(completions, device=META), torch.zeros_like(samples.log_probs)
        given = (policy, master, samples, advantages, zeros, zeros, torch.arange(completions), settings)
        with count_traffic("meta") as traffic:
            train.accumulate_gradients(*given, micro_batch)
    tokens = completions * completion + completions // samples.group_size * prompt
    body = policy.num_parameters() - policy.get_input_embeddings().weight.numel()
    return traffic, 6.0 * body * tokens / traffic.total.seconds / PEAK_RATE
