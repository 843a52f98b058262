"""One GRPO step: its gradient against TRL's trainer, its invariances, and what it must and must not change."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import train
from src import llama
from src.logprobs import PACKED_TOKENS, micro_batches
from src.master_weights import MasterWeights
from src.models import frozen_copy
from src.sampler import Samples, sample
from tests.conftest import make_policy

PROMPTS = [[1, 10, 11, 12, 13, 14, 15, 16], [1, 20, 21]]
EOS = 2
SETTINGS = dict(
    train_batch_size=8,
    micro_batch_size=8,
    epochs_per_step=1,
    temperature=0.8,
    kl_weight=0.01,
    clip_eps=0.2,
    max_norm=1e9,
    loss_normalizer="token",
    max_completion_length=20,
)


class Recorder(torch.optim.SGD):
    """An optimizer that keeps the gradients it is given and changes nothing."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.0)
        self.gradients = []

    def step(self):
        self.gradients.append([p.grad.clone() for group in self.param_groups for p in group["params"]])


def draw(policy, seed=0, group_size=4, **kwargs) -> Samples:
    settings = dict(max_length=28, max_new_tokens=None, top_p=1.0, stop_ids=[EOS], pad_id=EOS, temperature=0.8) | kwargs
    return sample(policy, PROMPTS, group_size, generator=torch.Generator().manual_seed(seed), **settings)


def stopping_policy(seed=0):
    """A random policy whose completions are of very different lengths."""
    policy = make_policy(seed)
    policy.lm_head.weight.data[EOS] += 0.6
    return policy


def perturbed(policy, seed):
    other = copy.deepcopy(policy)
    g = torch.Generator().manual_seed(seed)
    for p in other.parameters():
        p.data += 0.03 * p.abs().mean() * torch.randn(p.shape, generator=g)
    return other


def step(policy, reference, samples, advantages, optimizer=None, master=None, **changes):
    master = master or MasterWeights(policy, torch.float32)
    optimizer = optimizer or torch.optim.AdamW(master.parameters, lr=5e-6, weight_decay=0.0, fused=True)
    generator = torch.Generator().manual_seed(0)
    settings = SETTINGS | changes
    reference_of = None
    if reference is not None:
        reference_of = train.reference_log_probs(reference, samples, 4, settings["temperature"], settings["micro_batch_size"])
    return train.update(policy, master, optimizer, samples, advantages, reference_of, 4, generator, **settings)


def gradient_of_a_step(policy, reference, samples, advantages, **changes):
    recorder = Recorder(policy.parameters())
    step(policy, reference, samples, advantages, optimizer=recorder, **changes)
    assert len(recorder.gradients) == 1
    return recorder.gradients[0]


@pytest.mark.parametrize(("kl_weight", "micro_batch_size"), [(0.1, 3), (0.0, 8)])
def test_the_gradient_of_a_whole_step_equals_trls(policy_folder, tmp_path, kl_weight, micro_batch_size):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    old = stopping_policy()
    samples = draw(old)
    policy, reference = perturbed(old, 2), perturbed(old, 3)  # some updates later: ratios off 1, some of them clipped
    advantages = torch.tensor([1.0, -0.5, 0.25, -0.75, 2.0, -1.0, -0.5, -0.5])
    ours = gradient_of_a_step(
        policy, reference if kl_weight else None, samples, advantages, kl_weight=kl_weight, micro_batch_size=micro_batch_size
    )

    config = GRPOConfig(
        output_dir=str(tmp_path), loss_type="bnpo", beta=kl_weight, epsilon=0.2, temperature=0.8, num_generations=4,
        per_device_train_batch_size=8, max_completion_length=20, use_cpu=True, bf16=False, report_to=[],
        gradient_checkpointing=False, disable_dropout=True,
        use_bias_correction_kl=False,  # the paper's KL term; TRL's default multiplies it by the ratio (arXiv:2512.02556)
    )  # fmt: skip
    trainer = GRPOTrainer(
        str(policy_folder), reward_funcs=lambda **_: [0.0], args=config, train_dataset=Dataset.from_list([{"prompt": "x"}] * 8)
    )
    trainer.current_gradient_accumulation_steps = 1
    model = trainer.model
    model.load_state_dict(policy.state_dict())

    # TRL's layout: prompts padded on the left, completions on the right, each with its mask.
    p, c = 8, max(map(len, samples.completion_ids))
    prompts = [prompt for prompt in PROMPTS for _ in range(4)]
    left = lambda rows, fill: torch.tensor([[fill] * (p - len(r)) + r for r in rows])  # noqa: E731
    right = lambda rows, fill: torch.tensor([r + [fill] * (c - len(r)) for r in rows])  # noqa: E731
    ones = lambda rows: [[1] * len(r) for r in rows]  # noqa: E731
    inputs = {
        "prompt_ids": left(prompts, 0), "prompt_mask": left(ones(prompts), 0),
        "completion_ids": right(samples.completion_ids, 0), "completion_mask": right(ones(samples.completion_ids), 0),
        "advantages": advantages, "num_items_in_batch": samples.action_mask.sum(),
    }  # fmt: skip
    rows = lambda values: right([v[m].tolist() for v, m in zip(values, samples.action_mask, strict=True)], 0.0)  # noqa: E731
    inputs["old_per_token_logps"] = rows(samples.log_probs)
    if kl_weight:
        inputs["ref_per_token_logps"] = rows(train.reference_log_probs(reference, samples, 4, 0.8, 8))
    model.zero_grad()
    trainer._compute_loss(model, inputs).backward()

    theirs = [q.grad for q in model.parameters()]
    error = sum((a - b).square().sum() for a, b in zip(ours, theirs, strict=True)).sqrt()
    norm = sum(b.square().sum() for b in theirs).sqrt()
    assert norm > 0.01
    assert error / norm < 1e-4


@pytest.mark.parametrize("normalizer", ["token", "sequence", "constant"])
def test_accumulation_1x8_equals_8x1(normalizer):
    policy, reference = stopping_policy(), make_policy(1)
    samples = draw(policy)
    assert len(set(samples.action_mask.sum(1).tolist())) > 3  # unequal lengths: means of means would differ
    advantages = torch.linspace(-1, 1, 8)
    results = []
    for micro in (1, 3, 8):
        model = copy.deepcopy(policy)
        gradient = gradient_of_a_step(model, reference, samples, advantages, micro_batch_size=micro, loss_normalizer=normalizer)
        updated = copy.deepcopy(policy)
        metrics = step(updated, reference, samples, advantages, micro_batch_size=micro, loss_normalizer=normalizer)
        results.append((gradient, [p.detach() for p in updated.parameters()], metrics))
    for gradient, weights, metrics in results[1:]:
        for a, b in zip(gradient, results[0][0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        for a, b in zip(weights, results[0][1], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-6)  # Adam turns the sign of a tiny gradient into lr
        for name in metrics.keys() - {"time/reference_s", "policy/micro_batch_size"}:
            assert metrics[name] == pytest.approx(results[0][2][name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_over_99_percent_of_the_weights_with_a_gradient_change_after_one_step_at_5e_6(dtype):
    policy = stopping_policy()
    master = MasterWeights(policy, dtype)
    samples = draw(policy)
    before = [p.detach().clone() for p in master.parameters]
    gradients = []
    optimizer = torch.optim.AdamW(master.parameters, lr=5e-6, weight_decay=0.0)
    optimizer.register_step_pre_hook(lambda opt, *_: gradients.extend(p.grad.clone() for p in master.parameters))
    metrics = step(policy, None, samples, torch.linspace(-1, 1, 8), optimizer, master, kl_weight=0.0, max_norm=1.0)
    with_gradient = sum(int((g != 0).sum()) for g in gradients)
    moved = sum(int(((g != 0) & (p != b)).sum()) for g, p, b in zip(gradients, master.parameters, before, strict=True))
    assert with_gradient > 10_000
    assert moved / with_gradient > 0.99
    assert metrics["policy/moved_frac"] > 0.99


def test_the_stop_tokens_log_prob_rises_when_stopping_is_rewarded():
    """The bug of masks made from "token != pad": with one id for both, stopping is never learned."""
    policy = stopping_policy()
    samples = draw(policy, seed=1, group_size=4)
    assert samples.finished.any() and not samples.finished.all()
    advantages = torch.where(samples.finished, 1.0, -1.0)

    def stop_log_probs():
        lp = train.reference_log_probs(policy, samples, 4, 0.8, 8)
        return lp[samples.action_mask & (samples.sequence_ids[:, 1:] == EOS)]

    before = stop_log_probs()
    assert len(before) == samples.finished.sum()
    master = MasterWeights(policy, torch.float32)
    optimizer = torch.optim.AdamW(master.parameters, lr=1e-3)
    for _ in range(3):
        step(policy, None, samples, advantages, optimizer, master, kl_weight=0.0)
    assert (stop_log_probs() > before + 0.01).all()


def test_a_step_moves_every_parameter_of_the_policy_and_none_of_the_reference():
    policy = stopping_policy()
    reference = frozen_copy(policy)
    before = copy.deepcopy(policy)
    step(policy, reference, draw(policy), torch.linspace(-1, 1, 8))
    for (name, p), b, r in zip(policy.named_parameters(), before.parameters(), reference.parameters(), strict=True):
        assert not torch.equal(p, b), name
        assert torch.equal(r, b), name


def test_on_policy_the_first_update_has_no_clipping_no_gap_and_no_kl():
    policy = stopping_policy()
    metrics = step(policy, frozen_copy(policy), draw(policy), torch.linspace(-1, 1, 8))
    assert metrics["policy/clip_frac"] == 0
    assert metrics["policy/sampler_gap"] < 1e-5
    assert metrics["policy/kl"] < 1e-8
    assert metrics["policy/grad_norm"] > 1e-3


def test_without_an_advantage_the_kl_term_alone_pulls_the_policy_to_the_reference():
    policy, reference = stopping_policy(), make_policy(1)
    samples = draw(policy)
    master = MasterWeights(policy, torch.float32)
    optimizer = torch.optim.AdamW(master.parameters, lr=1e-3)
    kl = [step(policy, reference, samples, torch.zeros(8), optimizer, master, kl_weight=1.0)["policy/kl"] for _ in range(4)]
    assert kl[0] > kl[1] > kl[2] > kl[3] > 0


def test_groups_without_advantage_cost_no_forward_pass_and_change_nothing_when_there_is_no_kl(monkeypatch):
    policy = stopping_policy()
    samples = draw(policy)
    rows, compute = [], llama.packed_hidden  # prompts of each pass, one a question
    monkeypatch.setattr(
        llama,
        "packed_hidden",
        lambda model, ids, layout: rows.append(int((layout.positions == 0).sum())) or compute(model, ids, layout),
    )
    before = [p.detach().clone() for p in policy.parameters()]
    metrics = step(policy, None, samples, torch.zeros(8), kl_weight=0.0)
    assert rows == [] and metrics["policy/updates"] == 0
    assert all(torch.equal(p, b) for p, b in zip(policy.parameters(), before, strict=True))
    # One group with, one without: only its rows are computed, and the gradient is that of computing all.
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5, 0, 0, 0, 0])
    skipping = gradient_of_a_step(policy, None, samples, advantages, kl_weight=0.0)
    assert sum(rows) == 1
    whole = gradient_of_a_step(policy, policy, samples, advantages, kl_weight=1e-30)
    for a, b in zip(skipping, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_an_update_that_is_not_finite_is_skipped(capsys):
    policy = stopping_policy()
    samples = draw(policy)
    before = [p.detach().clone() for p in policy.parameters()]
    metrics = step(policy, None, samples, torch.tensor([float("nan")] * 8), kl_weight=0.0)
    assert metrics["policy/skipped_updates"] == 1 and metrics["policy/updates"] == 0
    assert all(torch.equal(p, b) for p, b in zip(policy.parameters(), before, strict=True))
    assert "not finite" in capsys.readouterr().out


def test_updates_are_as_many_as_train_batch_size_and_epochs_say():
    policy = stopping_policy()
    samples = draw(policy)
    metrics = step(policy, None, samples, torch.linspace(-1, 1, 8), train_batch_size=2, epochs_per_step=3, kl_weight=0.0)
    assert metrics["policy/updates"] == 12


@given(
    lengths=st.lists(st.integers(1, 500), min_size=2, max_size=24).filter(lambda v: len(v) % 2 == 0),
    size=st.integers(1, 10),
    prompt=st.integers(1, 300),
    by_hand=st.booleans(),
)
def test_micro_batches_hold_each_completion_once_within_their_limits(lengths, size, prompt, by_hand):
    width = prompt + max(lengths)
    ends = torch.tensor(lengths)[:, None] + prompt
    column = torch.arange(width)
    attention, actions = column < ends, ((column >= prompt) & (column < ends))[:, 1:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama, "fits", lambda model: by_hand)
        parts = micro_batches(make_policy(), attention, actions, torch.arange(len(lengths)).flip(0), 2, size)
    assert sorted(torch.cat([part.rows for part in parts]).tolist()) == list(range(len(lengths)))
    for part in parts:
        assert part.rows.tolist() == [r for members in part.packed for r in members]
        assert 1 <= len(part.rows) <= size
        assert part.width == prompt + max(lengths[r] for r in part.rows) - 1
        for members in part.packed:
            assert len({r // 2 for r in members}) == 1  # one question
            assert by_hand or len(members) == 1 or prompt + sum(lengths[r] for r in members) <= PACKED_TOKENS


@pytest.mark.parametrize("padded", [True, False])
def test_a_long_completion_goes_alone_where_rows_are_padded(monkeypatch, padded):
    """One of 390 tokens among seven of 40: together in one padded pass, 80 % of it would be padding."""
    monkeypatch.setattr(llama, "fits", lambda model: not padded)
    policy = make_policy()
    ends = torch.tensor([390] + [40] * 7)[:, None] + 30
    column = torch.arange(420)
    parts = micro_batches(policy, column < ends, ((column >= 30) & (column < ends))[:, 1:], torch.arange(8), 1, 8)
    assert [part.rows.tolist() for part in parts] == ([[1, 2, 3, 4, 5, 6, 7], [0]] if padded else [[1, 2, 3, 4, 5, 6, 7, 0]])
