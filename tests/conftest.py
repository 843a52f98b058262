"""Fixtures: tiny random models of real architectures, saved so that the real loading code runs offline."""

import os

# Set before anything reads them: no test may reach a network or Weights & Biases.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
# With pytest -n 2, each worker computes with one thread.
os.environ.update({"OMP_NUM_THREADS": "1"} if "PYTEST_XDIST_WORKER" in os.environ else {})

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForSequenceClassification,
)

if importlib.util.find_spec("verl") is None:
    collect_ignore = ["tools/verl_on_cpu.py"]

settings.register_profile("no-deadline", deadline=None)  # a busy machine must not fail a test
settings.load_profile("no-deadline")

ROOT = Path(__file__).resolve().parent.parent

VOCABULARY = 259  # three special tokens and 256 bytes

# TinyLlama-Chat's template. Its padding, end of completion and turn separator are all </s>.
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte, in which </s> is both padding and end.

    It is byte-level because AutoTokenizer makes every Qwen 2 tokenizer byte-level.
    """
    vocabulary = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
    )


def needs_verl() -> None:
    """Skip the calling test or fixture if verl cannot be installed here."""
    pytest.importorskip("verl", reason="verl is not installed; it needs Python 3.12 or older")


@pytest.fixture(autouse=True)
def forget_what_the_hub_answered():
    from src.hub import _ask_hub

    _ask_hub.cache_clear()


@pytest.fixture(autouse=True)
def say_nothing_about_other_programs(monkeypatch):
    """A busy machine must not change what a run prints, and neither must an earlier test's warning."""
    from src import console_lines

    monkeypatch.setattr(console_lines, "_said_crowded", True)
    monkeypatch.setattr(console_lines, "_said_gap", False)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def make_policy(seed: int = 0, **config) -> LlamaForCausalLM:
    """A random Llama in float32, with weights so large that its distributions are far from uniform."""
    torch.manual_seed(seed)
    settings = dict(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,  # of size 16, the smallest that src/engine/native is compiled for
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(LlamaConfig(**settings | config)).eval()


@pytest.fixture
def policy() -> LlamaForCausalLM:
    return make_policy()


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory, tokenizer) -> Path:
    """A saved random Llama with its tokenizer, for --model-name."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    make_policy().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_reward_model() -> Qwen2ForSequenceClassification:
    """A random Qwen2 sequence classifier with one label, the architecture of AceMath-7B-RM."""
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.2,
        num_labels=1,
        eos_token_id=2,
        pad_token_id=2,
        use_sliding_window=False,
    )
    return Qwen2ForSequenceClassification(config)


@pytest.fixture(scope="session")
def reward_model_folder(tmp_path_factory, tokenizer) -> Path:
    """A saved random reward model with its tokenizer, for --reward-model-name."""
    folder = tmp_path_factory.mktemp("models") / "tiny-qwen2-rm"
    make_reward_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny(policy_folder, tmp_path, monkeypatch) -> dict:
    """Settings of main() for a run of seconds on the tiny policy.

    It writes no report, which would take as long again.
    """
    monkeypatch.setattr("train.renew_report", lambda folder: None)
    return dict(
        model_name=str(policy_folder),
        reward_model_name="none",
        device="cpu",
        data=str(ROOT / "data/dummy_math_tasks.jsonl"),
        rollouts_per_step=2,
        group_size=4,
        train_batch_size=4,
        max_length=160,
        max_new_tokens=12,
        max_steps=2,
        output=str(tmp_path / "output"),
        run_name="run",
    )


def as_samples(sequence_ids, attention_mask, action_mask, group_size=1, log_probs=None):
    """Samples with these sequences; the log-probs default to 0."""
    from src.engine.sampler import Samples

    if log_probs is None:
        log_probs = torch.zeros(action_mask.shape)
    finished = torch.ones(len(action_mask), dtype=torch.bool)
    return Samples(sequence_ids, attention_mask, action_mask, log_probs, finished, group_size)


def all_log_probs(model, samples, temperature, size=64) -> torch.Tensor:
    """Log-probs (B, T-1) as training computes them, pass by pass."""
    from src.engine.logprobs import completion_log_probs, micro_batches

    result = torch.zeros(samples.action_mask.shape)
    for part in micro_batches(model, samples, torch.arange(len(result)), size):
        log_probs = completion_log_probs(model, samples, part, temperature)
        result = result.index_put((part.rows[:, None], torch.arange(part.width)[None]), log_probs)
    return result


def run_command(*arguments: str, timeout: float = 120, **kwargs) -> subprocess.CompletedProcess:
    """Run Python with these arguments in the root of the repository, as a user would."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
        **kwargs,
    )


def as_flags(settings: dict) -> list[str]:
    """Settings of main() as command-line flags."""
    return [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]
