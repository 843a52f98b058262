"""One GRPO step: its gradient compared with TRL's trainer, its invariances, and what it may change."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import train
from src.engine import llama
from src.engine.logprobs import PACKED_TOKENS, micro_batches
from src.engine.master_weights import MasterWeights
from src.engine.memory import BatchSize
from src.engine.sampler import Samples, Sampling, sample
from src.grpo import UpdateSettings
from src.models import Reference, frozen_copy
from src.run.checkpoint import TrainingState
from tests.conftest import as_samples, make_policy

PROMPTS = [[1, 10, 11, 12, 13, 14, 15, 16], [1, 20, 21]]
EOS = 2
SETTINGS = UpdateSettings(
    train_batch_size=8,
    epochs_per_step=1,
    temperature=0.8,
    kl_weight=0.01,
    clip_eps=0.2,
    max_norm=1e9,
    loss_normalizer="token",
    max_length=28,
    max_new_tokens=20,
)


class Recorder(torch.optim.SGD):
    """An optimizer that records the gradients it gets and changes nothing."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.0)
        self.gradients = []

    def step(self):
        self.gradients.append([p.grad.clone() for group in self.param_groups for p in group["params"]])


def draw(policy, seed=0, group_size=4) -> Samples:
    sampling = Sampling(temperature=0.8, top_p=1.0, max_length=28, max_new_tokens=None, stop_ids=[EOS])
    return sample(policy, PROMPTS, group_size, sampling, torch.Generator().manual_seed(seed))


def stopping_policy(seed=0):
    """A random policy whose completions have very different lengths."""
    policy = make_policy(seed)
    policy.lm_head.weight.data[EOS] += 0.6
    return policy


def perturbed(policy, seed):
    other = copy.deepcopy(policy)
    g = torch.Generator().manual_seed(seed)
    for p in other.parameters():
        p.data += 0.03 * p.abs().mean() * torch.randn(p.shape, generator=g)
    return other


def reference_log_probs(model, samples, micro_batch_size=8):
    micro_batch = BatchSize(micro_batch_size)
    return train.reference_log_probs(Reference(model), samples, SETTINGS.temperature, micro_batch)


def step(policy, reference, samples, advantages, optimizer=None, master=None, micro_batch_size=8, **changes):
    """Take one GRPO step with train.update, and return its metrics."""
    master = master or MasterWeights(policy, torch.float32)
    optimizer = optimizer or torch.optim.AdamW(master.parameters, lr=5e-6, weight_decay=0.0, fused=True)
    state = TrainingState(policy, None, master, optimizer, {"order": torch.Generator().manual_seed(0)})
    ref_log_probs = None if reference is None else reference_log_probs(reference, samples, micro_batch_size)
    settings, micro_batch = replace(SETTINGS, **changes), BatchSize(micro_batch_size)
    result = train.update(policy, state, samples, advantages, ref_log_probs, settings, micro_batch)
    return result.metrics(samples)


def gradient_of_a_step(policy, reference, samples, advantages, **changes):
    recorder = Recorder(policy.parameters())
    step(policy, reference, samples, advantages, optimizer=recorder, **changes)
    assert len(recorder.gradients) == 1
    return recorder.gradients[0]


def trl_trainer(policy, policy_folder, output, kl_weight):
    """TRL's GRPO trainer with the weights of a policy and the settings above."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    config = GRPOConfig(
        output_dir=str(output), loss_type="bnpo", beta=kl_weight, epsilon=0.2, temperature=0.8,
        num_generations=4, per_device_train_batch_size=8, max_completion_length=20, use_cpu=True, bf16=False,
        report_to=[], gradient_checkpointing=False, disable_dropout=True,
        # The paper's KL term. TRL's default multiplies it by the ratio (arXiv:2512.02556).
        use_bias_correction_kl=False,
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": "x"}] * 8)
    trainer = GRPOTrainer(str(policy_folder), reward_funcs=lambda **_: [0.0], args=config, train_dataset=data)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.load_state_dict(policy.state_dict())
    return trainer


def trl_inputs(samples, advantages, ref_log_probs):
    """The samples in TRL's layout: prompts padded on the left, completions on the right, each with a mask."""
    prompts = [prompt for prompt in PROMPTS for _ in range(samples.group_size)]
    completions = samples.completion_ids()
    p, c = max(map(len, prompts)), max(map(len, completions))

    def pad_prompts(rows):
        return torch.tensor([[0] * (p - len(row)) + row for row in rows])

    def pad_completions(rows):
        return torch.tensor([row + [0] * (c - len(row)) for row in rows])

    def completion_part(values):  # (B, T-1) -> (B, C)
        return pad_completions([v[m].tolist() for v, m in zip(values, samples.action_mask, strict=True)])

    inputs = {
        "prompt_ids": pad_prompts(prompts),
        "prompt_mask": pad_prompts([[1] * len(row) for row in prompts]),
        "completion_ids": pad_completions(completions),
        "completion_mask": pad_completions([[1] * len(row) for row in completions]),
        "advantages": advantages,
        "num_items_in_batch": samples.action_mask.sum(),
        "old_per_token_logps": completion_part(samples.log_probs),
    }
    if ref_log_probs is not None:
        inputs["ref_per_token_logps"] = completion_part(ref_log_probs)
    return inputs


@pytest.mark.parametrize(("kl_weight", "micro_batch_size"), [(0.1, 3), (0.0, 8)])
def test_the_gradient_of_a_complete_step_equals_trls(policy_folder, tmp_path, kl_weight, micro_batch_size):
    old = stopping_policy()
    samples = draw(old)
    # As after some updates: the ratios differ from 1, and some are clipped.
    policy, reference = perturbed(old, 2), perturbed(old, 3) if kl_weight else None
    advantages = torch.tensor([1.0, -0.5, 0.25, -0.75, 2.0, -1.0, -0.5, -0.5])
    settings = dict(kl_weight=kl_weight, micro_batch_size=micro_batch_size)
    ours = gradient_of_a_step(policy, reference, samples, advantages, **settings)

    trainer = trl_trainer(policy, policy_folder, tmp_path, kl_weight)
    ref_log_probs = reference_log_probs(reference, samples) if reference else None
    trainer.model.zero_grad()
    trainer._compute_loss(trainer.model, trl_inputs(samples, advantages, ref_log_probs)).backward()

    theirs = [p.grad for p in trainer.model.parameters()]
    error = sum((a - b).square().sum() for a, b in zip(ours, theirs, strict=True)).sqrt()
    norm = sum(b.square().sum() for b in theirs).sqrt()
    assert norm > 0.01
    assert error / norm < 1e-4


@pytest.mark.parametrize("normalizer", ["token", "sequence", "constant"])
def test_accumulating_8_passes_of_1_equals_1_pass_of_8(normalizer):
    policy, reference = stopping_policy(), make_policy(1)
    samples = draw(policy)
    # The lengths differ, so a mean of means would be wrong.
    assert len(set(samples.lengths.tolist())) > 3
    advantages = torch.linspace(-1, 1, 8)
    results = []
    for micro in (1, 3, 8):
        settings = dict(micro_batch_size=micro, loss_normalizer=normalizer)
        gradient = gradient_of_a_step(copy.deepcopy(policy), reference, samples, advantages, **settings)
        updated = copy.deepcopy(policy)
        metrics = step(updated, reference, samples, advantages, **settings)
        results.append((gradient, [p.detach() for p in updated.parameters()], metrics))
    for gradient, weights, metrics in results[1:]:
        for a, b in zip(gradient, results[0][0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        for a, b in zip(weights, results[0][1], strict=True):
            # An absolute tolerance: Adam turns even a tiny gradient into a step of lr, here 5e-6.
            torch.testing.assert_close(a, b, rtol=0, atol=2e-6)
        assert metrics.keys() == results[0][2].keys()
        for name in metrics:
            assert metrics[name] == pytest.approx(results[0][2][name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_step_at_lr_5e_6_changes_over_99_percent_of_the_weights_with_a_gradient(dtype):
    policy = stopping_policy()
    master = MasterWeights(policy, dtype)
    samples = draw(policy)
    before = [p.detach().clone() for p in master.parameters]
    gradients = []
    optimizer = torch.optim.AdamW(master.parameters, lr=5e-6, weight_decay=0.0)
    optimizer.register_step_pre_hook(lambda *_: gradients.extend(p.grad.clone() for p in master.parameters))
    advantages = torch.linspace(-1, 1, 8)
    step(policy, None, samples, advantages, optimizer, master, kl_weight=0.0, max_norm=1.0)
    weights = list(zip(gradients, before, master.parameters, strict=True))
    with_gradient = sum(int((g != 0).sum()) for g, _, _ in weights)
    moved = sum(int(((g != 0) & (old != new)).sum()) for g, old, new in weights)
    assert with_gradient > 10_000
    assert moved / with_gradient > 0.99


def test_the_stop_tokens_log_prob_rises_when_stopping_is_rewarded():
    """With masks made from "token != pad" and one id for both, a policy would never learn to stop."""
    policy = stopping_policy()
    samples = draw(policy, seed=1, group_size=4)
    assert samples.finished.any() and not samples.finished.all()
    advantages = torch.where(samples.finished, 1.0, -1.0)

    def stop_log_probs():
        lp = reference_log_probs(policy, samples)
        return lp[samples.action_mask & (samples.sequence_ids[:, 1:] == EOS)]

    before = stop_log_probs()
    assert len(before) == samples.finished.sum()
    master = MasterWeights(policy, torch.float32)
    optimizer = torch.optim.AdamW(master.parameters, lr=1e-3)
    for _ in range(3):
        step(policy, None, samples, advantages, optimizer, master, kl_weight=0.0)
    assert (stop_log_probs() > before + 0.01).all()


def test_a_step_changes_every_parameter_of_the_policy_and_none_of_the_reference():
    policy = stopping_policy()
    reference = frozen_copy(policy)
    before = copy.deepcopy(policy)
    step(policy, reference, draw(policy), torch.linspace(-1, 1, 8))
    weights = (policy.named_parameters(), before.parameters(), reference.parameters())
    for (name, p), b, r in zip(*weights, strict=True):
        assert not torch.equal(p, b), name
        assert torch.equal(r, b), name


def test_the_first_on_policy_update_has_no_clipping_no_gap_and_no_kl():
    policy = stopping_policy()
    metrics = step(policy, frozen_copy(policy), draw(policy), torch.linspace(-1, 1, 8))
    assert metrics["policy/clip_frac"] == 0
    assert metrics["policy/sampler_gap"] < 1e-5
    assert metrics["policy/kl"] < 1e-8
    assert metrics["policy/grad_norm"] > 1e-3


def test_without_an_advantage_the_kl_term_still_pulls_the_policy_to_the_reference():
    policy, reference = stopping_policy(), make_policy(1)
    samples = draw(policy)
    master = MasterWeights(policy, torch.float32)
    optimizer = torch.optim.AdamW(master.parameters, lr=1e-3)
    given = (policy, reference, samples, torch.zeros(8), optimizer, master)
    kl = [step(*given, kl_weight=1.0)["policy/kl"] for _ in range(4)]
    assert kl[0] > kl[1] > kl[2] > kl[3] > 0


def test_without_a_kl_term_groups_without_an_advantage_cost_no_pass_and_change_nothing(monkeypatch):
    policy = stopping_policy()
    samples = draw(policy)
    prompts, real = [], llama.packed_hidden  # the number of prompts in each pass, one per question

    def packed_hidden(model, ids, layout):
        prompts.append(int((layout.positions == 0).sum()))
        return real(model, ids, layout)

    monkeypatch.setattr(llama, "packed_hidden", packed_hidden)
    before = [p.detach().clone() for p in policy.parameters()]
    metrics = step(policy, None, samples, torch.zeros(8), kl_weight=0.0)
    assert prompts == [] and metrics["policy/updates"] == 0
    assert all(torch.equal(p, b) for p, b in zip(policy.parameters(), before, strict=True))
    # One group has an advantage: only its rows are computed, and the gradient is the same as for all rows.
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5, 0, 0, 0, 0])
    skipping = gradient_of_a_step(policy, None, samples, advantages, kl_weight=0.0)
    assert sum(prompts) == 1
    complete = gradient_of_a_step(policy, policy, samples, advantages, kl_weight=1e-30)
    for a, b in zip(skipping, complete, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_nonfinite_update_is_skipped(capsys):
    policy = stopping_policy()
    samples = draw(policy)
    before = [p.detach().clone() for p in policy.parameters()]
    metrics = step(policy, None, samples, torch.tensor([float("nan")] * 8), kl_weight=0.0)
    assert metrics["policy/skipped_updates"] == 1 and metrics["policy/updates"] == 0
    assert all(torch.equal(p, b) for p, b in zip(policy.parameters(), before, strict=True))
    assert "not finite" in capsys.readouterr().out


def test_train_batch_size_and_epochs_per_step_decide_the_number_of_updates():
    policy = stopping_policy()
    samples = draw(policy)
    settings = dict(train_batch_size=2, epochs_per_step=3, kl_weight=0.0)
    metrics = step(policy, None, samples, torch.linspace(-1, 1, 8), **settings)
    assert metrics["policy/updates"] == 12


@given(
    lengths=st.lists(st.integers(1, 500), min_size=2, max_size=24).filter(lambda v: len(v) % 2 == 0),
    size=st.integers(1, 10),
    prompt=st.integers(1, 300),
    supported=st.booleans(),
)
def test_micro_batches_contain_each_completion_once_within_their_limits(lengths, size, prompt, supported):
    width = prompt + max(lengths)
    ends = torch.tensor(lengths)[:, None] + prompt
    column = torch.arange(width)
    attention, actions = column < ends, ((column >= prompt) & (column < ends))[:, 1:]
    samples = as_samples(attention.long(), attention, actions, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama, "is_supported", lambda model: supported)
        parts = micro_batches(make_policy(), samples, torch.arange(len(lengths)).flip(0), size)
    assert sorted(torch.cat([part.rows for part in parts]).tolist()) == list(range(len(lengths)))
    for part in parts:
        assert part.rows.tolist() == [r for members in part.packed for r in members]
        assert 1 <= len(part.rows) <= size
        assert part.width == prompt + max(lengths[r] for r in part.rows) - 1
        for members in part.packed:
            assert len({r // 2 for r in members}) == 1  # one question
            tokens = prompt + sum(lengths[r] for r in members)
            assert supported or len(members) == 1 or tokens <= PACKED_TOKENS


@pytest.mark.parametrize("padded", [True, False])
def test_a_long_completion_gets_its_own_pass_if_rows_are_padded(monkeypatch, padded):
    """One completion has 390 tokens and seven have 40: 80 % of one padded pass for all would be padding."""
    monkeypatch.setattr(llama, "is_supported", lambda model: not padded)
    policy = make_policy()
    ends = torch.tensor([390] + [40] * 7)[:, None] + 30
    column = torch.arange(420)
    samples = as_samples(column.expand(8, -1), column < ends, ((column >= 30) & (column < ends))[:, 1:])
    parts = micro_batches(policy, samples, torch.arange(8), 8)
    expected = [[1, 2, 3, 4, 5, 6, 7], [0]] if padded else [[1, 2, 3, 4, 5, 6, 7, 0]]
    assert [part.rows.tolist() for part in parts] == expected


@pytest.mark.parametrize("by_hand", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("failures", [1, 2])
def test_a_backward_pass_that_ran_out_of_memory_leaves_nothing_behind(monkeypatch, by_hand, dtype, failures):
    """The retry once added to the gradients that the failed pass had left in the head and the last layers."""
    if not by_hand:
        monkeypatch.setattr(llama, "is_supported", lambda model: False)

    def gradients(failures: int, micro_batch_size: int) -> list[torch.Tensor]:
        policy = stopping_policy()
        samples, advantages = draw(policy), torch.linspace(-1, 1, 8)
        master = MasterWeights(policy, dtype)

        def fail(gradient):
            nonlocal failures
            if failures:
                failures -= 1
                raise torch.OutOfMemoryError("CUDA out of memory.")

        policy.model.layers[0].self_attn.q_proj.weight.register_hook(fail)
        recorder = Recorder(master.parameters)
        given = dict(optimizer=recorder, master=master, micro_batch_size=micro_batch_size)
        step(policy, None, samples, advantages, **given)
        assert failures == 0
        return recorder.gradients[0]

    without = gradients(0, 8 // 2**failures)
    for a, b in zip(gradients(failures, 8), without, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)
