"""The sampler compared with teacher forcing, with transformers' generate, and with exact probabilities."""

from dataclasses import replace

import pytest
import torch

from src.engine import sampler
from src.engine.sampler import Sampling, sample
from tests.conftest import all_log_probs, make_policy

# Three lengths; one prompt contains stop tokens.
PROMPTS = [[1, 10, 11, 12, 13, 14, 15, 16], [1, 20, 21], [1, 30, 2, 31, 32, 2]]
EOS = 2


def run(policy, prompts=PROMPTS, group_size=4, seed=0, temperature=0.8, **kwargs):
    settings = dict(max_length=40, max_new_tokens=None, top_p=1.0, stop_ids=[EOS]) | kwargs
    sampling = Sampling(temperature=temperature, **settings)
    return sample(policy, prompts, group_size, sampling, torch.Generator().manual_seed(seed))


def check_layout(samples, prompts, group_size):
    """Check the ids, masks and lengths of every row against the lists of tokens."""
    prompts = [p for p in prompts for _ in range(group_size)]
    assert samples.sequence_ids.shape == samples.attention_mask.shape
    assert samples.action_mask.shape == samples.log_probs.shape == samples.sequence_ids[:, 1:].shape
    for i, (prompt, completion) in enumerate(zip(prompts, samples.completion_ids(), strict=True)):
        n, m = len(prompt), len(completion)
        assert samples.sequence_ids[i, : n + m].tolist() == prompt + completion
        assert samples.attention_mask[i].tolist() == [j < n + m for j in range(samples.sequence_ids.shape[1])]
        assert samples.action_mask[i].nonzero()[:, 0].tolist() == list(range(n - 1, n + m - 1))
        assert EOS not in completion[:-1]
        assert samples.finished[i].item() == (completion[-1] == EOS)


@pytest.mark.parametrize("temperature", [0.5, 0.8, 1.0, 1.7])
def test_log_probs_equal_those_of_a_teacher_forced_forward_pass(policy, temperature):
    samples = run(policy, temperature=temperature)
    check_layout(samples, PROMPTS, 4)
    with torch.no_grad():
        logits = policy(samples.sequence_ids, attention_mask=samples.attention_mask.long()).logits[:, :-1]
    log_probs = (logits / temperature).log_softmax(-1).gather(2, samples.sequence_ids[:, 1:, None])[..., 0]
    gap = (log_probs - samples.log_probs)[samples.action_mask].abs().max()
    assert gap < 1e-4
    assert (samples.log_probs[~samples.action_mask] == 0).all()
    for group_size in (1, 4):  # one completion per row, and packed behind their prompt
        grouped = replace(samples, group_size=group_size)
        assert (all_log_probs(policy, grouped, temperature) - samples.log_probs).abs().max() < 1e-4


def test_the_stop_token_is_in_the_action_mask_although_it_is_the_padding_token():
    policy = make_policy()
    policy.lm_head.weight.data[EOS] += 0.5  # stops often
    samples = run(policy, group_size=16)
    check_layout(samples, PROMPTS, 16)
    assert samples.finished.any() and not samples.finished.all()
    for i in samples.finished.nonzero()[:, 0].tolist():
        last = int(samples.attention_mask[i].sum()) - 1
        assert samples.sequence_ids[i, last] == EOS
        assert samples.action_mask[i, last - 1]
        assert samples.log_probs[i, last - 1] < 0
    assert samples.attention_mask[2 * 16, :6].all()  # stop tokens in a prompt are attended to


def test_a_completion_that_stops_immediately_has_one_action():
    policy = make_policy(tie_word_embeddings=False)
    policy.lm_head.weight.data.zero_()
    hidden = policy.model(torch.tensor([PROMPTS[1]])).last_hidden_state[0, -1].detach()
    policy.lm_head.weight.data[EOS] = 100 * hidden.sign()
    samples = run(policy, [PROMPTS[1]], 3)
    assert samples.completion_ids() == [[EOS]] * 3
    assert samples.action_mask.sum(dim=1).tolist() == [1, 1, 1]
    assert samples.finished.all()


def test_greedy_completions_equal_those_of_generate_for_50_prompts(policy):
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 15, (50,), generator=g).tolist()
    prompts = [torch.randint(3, 259, (length,), generator=g).tolist() for length in lengths]
    samples = run(policy, prompts, group_size=1, temperature=0.0, max_new_tokens=20)
    settings = dict(do_sample=False, max_new_tokens=20, eos_token_id=EOS, pad_token_id=EOS)
    for prompt, completion in zip(prompts, samples.completion_ids(), strict=True):
        out = policy.generate(torch.tensor([prompt]), **settings)
        assert out[0, len(prompt) :].tolist() == completion


def test_a_prompts_completions_do_not_depend_on_the_other_prompts(policy):
    """Padding on the left, the shared prefill and the batch do not change them."""
    together = run(policy, group_size=1, temperature=0.0).completion_ids()
    assert together == [run(policy, [p], 1, temperature=0.0).completion_ids()[0] for p in PROMPTS]


@pytest.mark.parametrize("compact_below", [0.0, 0.5, 1.1])
def test_it_does_not_matter_when_finished_rows_leave_the_batch(policy, monkeypatch, compact_below):
    policy.lm_head.weight.data[EOS] += 0.3
    expected = run(policy, group_size=8)
    monkeypatch.setattr(sampler, "COMPACT_BELOW", compact_below)
    samples = run(policy, group_size=8)
    assert samples.completion_ids() == expected.completion_ids()
    torch.testing.assert_close(samples.log_probs, expected.log_probs, atol=1e-5, rtol=0)


def test_completions_respect_their_limits_and_truncated_ones_are_not_finished(policy):
    samples = run(policy, max_length=12)
    lengths = [len(c) for c in samples.completion_ids()]
    for i, length in enumerate(lengths):
        limit = 12 - len(PROMPTS[i // 4])
        assert length == limit or (length < limit and samples.finished[i])
    assert max(map(len, run(policy, max_new_tokens=3).completion_ids())) == 3
    assert run(policy, max_length=9, prompts=[PROMPTS[0]]).action_mask.sum(1).tolist() == [1] * 4


def test_first_tokens_are_drawn_from_the_tempered_distribution(policy):
    """Frequencies of 20,000 draws are within 5 standard errors of softmax(logits / T).

    A correct sampler fails about once in 10,000 seeds.
    """
    draws, temperature = 20_000, 0.7
    samples = run(policy, [PROMPTS[1]], draws, temperature=temperature, max_new_tokens=1)
    with torch.no_grad():
        p = (policy(torch.tensor([PROMPTS[1]])).logits[0, -1] / temperature).softmax(-1)
    counts = torch.bincount(torch.tensor([c[0] for c in samples.completion_ids()]), minlength=len(p))
    error = (counts / draws - p).abs() / (p * (1 - p) / draws).sqrt()
    assert error[p > 1e-3].max() < 5
    assert counts[p < 1e-7].sum() == 0


def test_completions_pass_a_chi_square_test_against_their_exact_probabilities():
    """20,000 completions of up to two tokens, from a vocabulary of 12, against all possible completions.

    A correct sampler fails about once in 10,000 seeds.
    """
    policy = make_policy(vocab_size=12)
    draws, temperature, prompt = 20_000, 0.9, [1, 5, 6, 7]
    samples = run(policy, [prompt], draws, temperature=temperature, max_new_tokens=2, stop_ids=[EOS])
    with torch.no_grad():
        first = (policy(torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1)
        second = policy(torch.tensor([[*prompt, t] for t in range(12)])).logits[:, -1]
        joint = first[:, None] * (second / temperature).softmax(-1)  # (12, 12)
    others = [t for t in range(12) if t != EOS]  # after these, a second token follows
    expected = torch.cat([joint[others].flatten(), first[EOS : EOS + 1]]).double() * draws
    counts = torch.zeros(12, 12)
    for completion in samples.completion_ids():
        counts[completion[0], completion[-1] if len(completion) == 2 else 0] += 1
    seen = torch.cat([counts[others].flatten(), counts[EOS, :1]]).double()
    assert seen.sum() == draws
    rare = expected < 5  # merged into one cell, or the statistic would not follow chi-square
    seen, expected = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (seen, expected))
    statistic, freedom = float(((seen - expected) ** 2 / expected).sum()), len(seen) - 1
    # Wilson and Hilferty: the cube root of chi-square / freedom is approximately normal.
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5
    assert abs(z) < 3.9


def test_top_p_samples_from_the_smallest_sufficient_set_and_records_log_probs_of_the_full_one(policy):
    samples = run(policy, [PROMPTS[1]], 2000, top_p=0.6, max_new_tokens=1)
    with torch.no_grad():
        p = (policy(torch.tensor([PROMPTS[1]])).logits[0, -1] / 0.8).softmax(-1)
    order = p.argsort(descending=True)
    size = int((p[order].cumsum(0) < 0.6).sum()) + 1
    assert {c[0] for c in samples.completion_ids()} <= set(order[:size].tolist())
    assert len({c[0] for c in samples.completion_ids()}) > 1
    log_probs = samples.log_probs[samples.action_mask]
    picked = torch.tensor([c[0] for c in samples.completion_ids()])
    torch.testing.assert_close(log_probs, p.log()[picked], atol=1e-5, rtol=0)


def test_the_same_seed_gives_the_same_completions(policy):
    assert run(policy, seed=5).completion_ids() == run(policy, seed=5).completion_ids()
    assert run(policy, seed=5).completion_ids() != run(policy, seed=6).completion_ids()


def test_the_last_number_of_the_unit_interval_never_picks_an_impossible_token():
    logits = torch.full((1, 50), -torch.inf)
    logits[0, :3] = torch.tensor([0.1, 0.2, 0.3])
    top = torch.tensor([1.0 - 2**-24])
    for top_p in (1.0, 0.9):
        token, log_prob = sampler._pick(logits, 1.0, top_p, top)
        assert token.item() in (0, 1, 2) and log_prob.isfinite().all()
    token, _ = sampler._pick(logits, 1.0, 1.0, torch.tensor([0.0]))
    assert token.item() == 0


@pytest.mark.parametrize("vocabulary", [100, 256, 1000])
def test_the_gpus_choice_inverts_the_cdf(vocabulary):
    g = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(500, vocabulary, generator=g)
    uniform = torch.rand(500, generator=g)
    uniform[:2] = torch.tensor([0.0, 1 - 2**-24])  # the ends of the interval that torch.rand draws from
    token, log_prob = sampler.choose(logits, uniform, 0.7)
    expected = (logits / 0.7).log_softmax(-1)
    torch.testing.assert_close(log_prob, expected.gather(1, token[:, None])[:, 0])
    end = expected.double().exp().cumsum(1).gather(1, token[:, None])[:, 0]
    start = end - log_prob.double().exp()
    assert ((start - 1e-5 <= uniform) & (uniform <= end + 1e-5)).all()


def test_the_gpus_choice_never_takes_a_token_without_probability():
    logits = torch.full((200, 700), -200.0)
    logits[:, [3, 255, 256, 699]] = 0.0
    token, _ = sampler.choose(logits, torch.linspace(0, 1 - 2**-24, 200), 1.0)
    assert token.unique().tolist() == [3, 255, 256, 699]
