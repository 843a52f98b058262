"""Tiny random models of the real architectures, saved to disk, so that the real loading code runs without a hub."""

import os

# Before anything reads them: no test may reach a network or Weights & Biases.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForSequenceClassification

settings.register_profile("here", deadline=None)  # a busy machine is no failure
settings.load_profile("here")

ROOT = Path(__file__).resolve().parent.parent

VOCABULARY = 259  # three special tokens and 256 bytes

# TinyLlama-Chat's: pad, end of completion and turn separator are all </s>.
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and </s> for both padding and the end. Byte-level, as AutoTokenizer makes every Qwen 2 tokenizer."""
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


@pytest.fixture(autouse=True)
def the_hub_is_asked_anew():
    from src.models import _ask_hub

    _ask_hub.cache_clear()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def make_policy(seed: int = 0, **config) -> LlamaForCausalLM:
    """Random Llama, float32. Weights larger than usual, so that its distributions are far from uniform."""
    torch.manual_seed(seed)
    settings = dict(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,  # of 16 entries, the smallest that src/native is compiled for
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
    """A saved random Llama with its tokenizer, as --model-name takes it."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    make_policy().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_reward_model() -> Qwen2ForSequenceClassification:
    """Random Qwen2 sequence classifier with one label, AceMath-7B-RM's architecture."""
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
    """A saved random reward model with its tokenizer, as --reward-model-name takes it."""
    folder = tmp_path_factory.mktemp("models") / "tiny-qwen2-rm"
    make_reward_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny(policy_folder, tmp_path, monkeypatch) -> dict:
    """Settings of main() for a run of seconds on the tiny policy; it draws no report, which would take as long again."""
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


def all_log_probs(model, ids, mask, actions, temperature, group_size=1, size=64) -> torch.Tensor:
    """(B, T-1) log-probs by the project's own path, pass by pass."""
    from src.logprobs import completion_log_probs, micro_batches

    whole = torch.zeros(actions.shape)
    for part in micro_batches(model, mask, actions, torch.arange(len(ids)), group_size, size):
        of_part = completion_log_probs(model, ids, actions, part, temperature)
        whole = whole.index_put((part.rows[:, None], torch.arange(part.width)[None]), of_part)
    return whole


def run_command(*arguments: str, timeout: float = 120, **kwargs) -> subprocess.CompletedProcess:
    """Run a script of the repository as a user would, from another folder's point of view: by the repository's root."""
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
    """main()'s parameters as command-line flags."""
    return [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]
