"""The planned memory of an update against the blocks of memory that its passes really allocate."""

import random
from dataclasses import dataclass

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import train
from benchmarks.counting import Allocations
from benchmarks.fake_gpu import META, meta_gpu, on_device
from src import metrics, models
from src.engine.master_weights import MasterWeights
from src.engine.memory_plan import Plan
from src.engine.model_size import measure
from src.grpo import UpdateSettings
from tests.conftest import as_samples

TINYLLAMA = dict(
    vocab_size=32_000, hidden_size=2048, intermediate_size=5632, num_attention_heads=32, num_key_value_heads=4
)  # fmt: skip
SMOLLM2 = dict(
    vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3,
    tie_word_embeddings=True,
)  # fmt: skip


@dataclass
class Setting:
    config: LlamaConfig
    prompt: int
    completion: int
    group: int
    size: int  # of a micro-batch
    lora_rank: int
    checkpointing: bool
    passes: int  # at least two, the second of which finds the sums of the first one's gradients; or one

    @property
    def completions(self) -> int:
        groups = -(-2 * self.size // self.group) if self.passes == 2 else max(1, self.size // self.group)
        return groups * self.group


def draw(generator: random.Random, layers: dict[int, int]) -> Setting:
    """A random setting.

    Args:
        layers: The number of layers of a model, by its hidden size.
    """
    sizes = generator.choice([TINYLLAMA, SMOLLM2])
    return Setting(
        LlamaConfig(**sizes, num_hidden_layers=layers[sizes["hidden_size"]]),
        prompt=generator.randint(1, 1500),
        completion=generator.randint(2, 700),
        group=generator.choice([2, 4, 8, 16]),
        size=generator.randint(1, 32),
        lora_rank=generator.choice([0, 16]),
        checkpointing=generator.random() < 0.5,
        passes=generator.choice([1, 2]),
    )


def planned(setting: Setting) -> tuple[float, float]:
    """Bytes of an update, and how many of them are there before its first pass."""
    with META:
        skeleton = AutoModelForCausalLM.from_config(setting.config, dtype=torch.bfloat16)
    if setting.lora_rank:
        models.add_lora(skeleton, setting.lora_rank)
    sizes = (setting.completions, setting.group, setting.size, setting.prompt, setting.completion)
    plan = Plan(
        measure(skeleton, "cuda"),
        "cuda",
        *sizes,
        reference=False,
        passes=-(-setting.completions // setting.size),
        gradient_checkpointing=setting.checkpointing,
    )
    update = plan.table()["update"]
    added = sum(update.pop(part, 0.0) for part in ("gradients", "logits", "activations"))
    before = sum(size for part, size in update.items() if part != "kept cache")
    return before + added, before


def counted(setting: Setting) -> float:
    """Peak bytes of `train.accumulate_gradients`, without what is there before."""
    with META:
        policy = AutoModelForCausalLM.from_config(setting.config, dtype=torch.float32).eval()
    if setting.lora_rank:
        models.add_lora(policy, setting.lora_rank)
    if setting.checkpointing:
        models.checkpoint_activations(policy)
    rows, length = setting.completions, setting.prompt + setting.completion
    ids = torch.zeros(rows, length, dtype=torch.long)
    actions = torch.arange(length - 1).expand(rows, -1) >= setting.prompt - 1
    real = torch.ones(rows, length, dtype=torch.bool)
    samples = on_device(as_samples(ids, real, actions, setting.group), META)
    master = MasterWeights(policy, torch.bfloat16)
    settings = UpdateSettings(
        train_batch_size=rows, epochs_per_step=1, temperature=1.0, kl_weight=0.0, clip_eps=0.2, max_norm=1.0,
        loss_normalizer="token", max_length=length, max_new_tokens=None,
    )  # fmt: skip
    weights, advantages = torch.zeros(rows, length - 1, device=META), torch.zeros(rows, device=META)
    existing = [*policy.parameters(), *policy.buffers(), *master.parameters, weights]
    existing += [value for value in vars(samples).values() if isinstance(value, torch.Tensor)]
    given = (policy, master, samples, advantages, None, weights, torch.arange(rows), settings, setting.size)
    with Allocations(existing) as allocations:
        train.accumulate_gradients(*given)
    return allocations.peak


def compare(settings: list[Setting]) -> None:
    for setting in settings:
        plan, before = planned(setting)
        with meta_gpu():
            peak = before + counted(setting)
        assert 0.9 * peak < plan < 1.1 * peak, (setting, plan / 1e9, peak / 1e9)


@pytest.fixture
def sums_unread(monkeypatch):
    """The metrics of a pass are values, which the meta device does not have."""
    monkeypatch.setattr(metrics.LossSums, "of", lambda passes: None)


def test_the_planned_peak_of_an_update_is_what_it_allocates(sums_unread):
    generator = random.Random(0)
    compare([draw(generator, {2048: 4, 576: 4}) for _ in range(8)])


@pytest.mark.slow  # 15 minutes
def test_the_planned_peak_of_500_updates_is_what_they_allocate(sums_unread):
    generator = random.Random(1)
    compare([draw(generator, {2048: 22, 576: 30}) for _ in range(500)])
