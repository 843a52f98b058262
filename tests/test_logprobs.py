"""Log-probs of packed completions against the plain forward pass, and the float32 master weights."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from src import models
from src.engine import llama, token_log_probs
from src.engine.architecture import can_pack
from src.engine.logprobs import completion_log_probs, micro_batches
from src.engine.master_weights import MasterWeights
from src.errors import InputError
from src.models import check_head, frozen_copy
from tests.conftest import all_log_probs, as_samples, make_policy
from tests.test_sampler import run

PROMPT_TOKENS = 3


def batch(seed=0, lengths=(9, 5, 12, 4), group_size=2, prompt=PROMPT_TOKENS):
    """Ids and masks of sequences; those of the same question begin with the same prompt."""
    g = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(3, 259, (len(lengths), width), generator=g)
    prompts = ids[::group_size, :prompt].repeat_interleave(group_size, 0)
    ids = torch.cat([prompts, ids[:, prompt:]], dim=1)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    ids = torch.where(mask, ids, 2)
    actions = mask[:, 1:].clone()
    actions[:, : prompt - 1] = False
    return ids, mask, actions


def naive(policy, ids, mask, actions, temperature):
    logits = policy(ids, attention_mask=mask.long()).logits[:, :-1].float() / temperature
    return logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0] * actions


@pytest.mark.parametrize("path", ["hand-written", "sdpa", "eager"])
@pytest.mark.parametrize("group_size", [1, 2])
@pytest.mark.parametrize(("block", "size"), [(1, 64), (4, 3), (1000, 1)])
def test_values_and_gradients_equal_the_plain_ones_however_rows_are_packed_and_split(
    monkeypatch, block, size, group_size, path
):
    monkeypatch.setattr(token_log_probs, "VOCABULARY_BLOCK", block)
    policy = make_policy(attn_implementation="sdpa" if path == "hand-written" else path)
    if path != "hand-written":
        monkeypatch.setattr(llama, "is_supported", lambda model: False)
    ids, mask, actions = batch()
    weights = torch.rand(actions.shape, generator=torch.Generator().manual_seed(1))
    ours = all_log_probs(policy, as_samples(ids, mask, actions, group_size), 0.7, size)
    (ours * weights).sum().backward()
    gradients = [p.grad.clone() for p in policy.parameters()]
    policy.zero_grad()
    plain = naive(policy, ids, mask, actions, 0.7)
    (plain * weights).sum().backward()
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    for g, p in zip(gradients, policy.parameters(), strict=True):
        torch.testing.assert_close(g, p.grad, atol=1e-5 * max(1.0, float(p.grad.abs().max())), rtol=1e-4)


def test_a_packed_row_holds_the_prompt_once_and_no_padding(policy, monkeypatch):
    monkeypatch.setattr(llama, "is_supported", lambda model: False)
    ids, mask, actions = batch()
    seen = []
    policy.model.register_forward_hook(
        lambda m, args, kwargs, out: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    samples = as_samples(ids, mask, actions, 2)
    (part,) = micro_batches(policy, samples, torch.arange(2), 64)
    completion_log_probs(policy, samples, part, 1.0)
    # Sorted by length: the prompt, the two tokens of row 1, and the six of row 0. The last token of each
    # predicts nothing, so it is left out.
    assert part.packed == [[1, 0]]
    assert seen[0].tolist() == [ids[0, :3].tolist() + ids[1, 3:4].tolist() + ids[0, 3:8].tolist()]


def test_a_model_with_a_sliding_window_is_not_packed():
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=4, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MistralForCausalLM(config).eval()
    assert not can_pack(model)
    assert can_pack(make_policy())
    ids, mask, actions = batch()
    torch.testing.assert_close(
        all_log_probs(model, as_samples(ids, mask, actions, 2), 1.0),
        naive(model, ids, mask, actions, 1.0),
        atol=1e-5,
        rtol=0,
    )


class WideTensors(TorchDispatchMode):
    """Records the number of rows of every tensor (..., vocabulary) that an operation returns.

    The head's transposed weight is one of them.
    """

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.rows = vocabulary, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor) and t.dim() > 1 and t.shape[-1] == self.vocabulary:
                self.rows.append(t.numel() // self.vocabulary)
        return out


def test_logits_exist_only_for_completion_tokens_and_one_block_of_the_vocabulary(policy, monkeypatch):
    policy.lm_head.requires_grad_(False)  # its gradient would have the vocabulary as a dimension too
    policy.model.embed_tokens.requires_grad_(False)
    ids, mask, actions = batch()
    for block, expected in ((4, set()), (1000, {int(actions.sum())})):
        monkeypatch.setattr(token_log_probs, "VOCABULARY_BLOCK", block)
        with WideTensors(policy.config.vocab_size) as wide:
            all_log_probs(policy, as_samples(ids, mask, actions, 2), 1.0).sum().backward()
        assert {n for n in wide.rows if n != policy.config.hidden_size} == expected


def test_a_model_that_caps_its_logits_is_refused():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    from src.errors import InputError

    config = Gemma2Config(
        vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, final_logit_softcapping=1.0, initializer_range=0.5,
    )  # fmt: skip
    with pytest.raises(InputError, match="soft cap"):
        check_head(Gemma2ForCausalLM(config).eval())
    check_head(make_policy())


# ----------------------------------------------------------------------------------------------------------
# Master weights


def test_updates_too_small_for_bfloat16_add_up_in_the_master_weights():
    """The bug: steps of 5e-6 never change a bfloat16 weight of 0.05, whose rounding step is 2.4e-4."""
    model = make_policy()
    master = MasterWeights(model, torch.bfloat16)
    before = [w.clone() for w in model.parameters()]
    for _ in range(100):
        for p in master.parameters:
            p.data += 5e-6
        master.write_back()
    plain = [w.clone() for w in before]
    for _ in range(100):
        for w in plain:
            w += 5e-6
    moved = [(w != b).float().mean() for w, b in zip(model.parameters(), before, strict=True)]
    lost = [(w == b).float().mean() for w, b in zip(plain, before, strict=True)]
    assert sum(moved) / len(moved) > 0.5
    assert sum(lost) / len(lost) > 0.9


def test_a_bfloat16_model_equals_one_loaded_by_transformers(policy_folder):
    """Rotary frequencies stay float32, because rounding them would change every position."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.float32).eval()
    MasterWeights(model, torch.bfloat16)
    theirs = AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.bfloat16).eval()
    ids = torch.randint(3, 259, (1, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, theirs(ids).logits)
    assert model.config.dtype == torch.bfloat16


def test_gradient_checkpointing_in_the_general_path_changes_only_memory(monkeypatch):
    monkeypatch.setattr(llama, "is_supported", lambda model: False)
    ids, mask, actions = batch()
    results = []
    for checkpointed in (False, True):
        model, kept = make_policy(attention_dropout=0.5, num_hidden_layers=4), []
        before = run(model, temperature=0.0).completion_ids()
        if checkpointed:
            models.checkpoint_activations(model)
        assert run(model, temperature=0.0).completion_ids() == before  # the cache still works
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: kept.append(t.nbytes) or t, lambda t: t
        ):
            log_probs = all_log_probs(model, as_samples(ids, mask, actions), 1.0)
        log_probs.sum().backward()
        results.append((sum(kept), log_probs, [p.grad for p in model.parameters()]))
    (all_kept, plain, gradients), (kept, again, recomputed) = results
    torch.testing.assert_close(again, plain)
    for a, b in zip(recomputed, gradients, strict=True):
        torch.testing.assert_close(a, b)
    assert kept < 0.5 * all_kept
    with pytest.raises(InputError, match="--gradient-checkpointing: the layers of Linear do not support it"):
        models.checkpoint_activations(torch.nn.Linear(1, 1))


def test_gradients_of_micro_batches_are_summed_in_float32():
    model, plain = make_policy(), make_policy()
    master = MasterWeights(model, torch.bfloat16)
    for w in plain.parameters():
        w.data = w.data.bfloat16()
    parts = [batch(seed) for seed in range(4)]
    total = [torch.zeros_like(w, dtype=torch.float32) for w in plain.parameters()]
    for part in parts:
        all_log_probs(model, as_samples(*part), 1.0).sum().backward()
        assert all(w.grad is None for w in model.parameters())
        all_log_probs(plain, as_samples(*part), 1.0).sum().backward()
        for t, w in zip(total, plain.parameters(), strict=True):
            t += w.grad.float()
            w.grad = None
    for t, p in zip(total, master.parameters, strict=True):
        assert p.grad.dtype == torch.float32
        torch.testing.assert_close(p.grad, t)


def test_in_float32_the_model_is_its_own_master(policy):
    master = MasterWeights(policy, torch.float32)
    assert all(a is b for a, b in zip(master.parameters, policy.parameters(), strict=True))


def test_the_reference_is_frozen_and_independent_of_the_policy(policy):
    reference = frozen_copy(policy)
    assert not any(p.requires_grad for p in reference.parameters())
    policy.lm_head.weight.data += 1
    assert not torch.equal(reference.lm_head.weight, policy.lm_head.weight)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen_head", [True, False])
@pytest.mark.parametrize("kept_blocks", [0, 2, 4])
def test_the_written_out_gradient_of_the_head_equals_autograd(monkeypatch, bias, frozen_head, kept_blocks):
    monkeypatch.setattr(token_log_probs, "VOCABULARY_BLOCK", 3)
    monkeypatch.setattr(token_log_probs, "KEPT_LOGITS", kept_blocks * 8 * 3 * 4)
    torch.manual_seed(0)
    head = torch.nn.Linear(6, 11, bias=bias).requires_grad_(not frozen_head)
    hidden, targets, upstream = torch.randn(8, 6, requires_grad=True), torch.randint(11, (8,)), torch.randn(8)
    inputs = [hidden] if frozen_head else [hidden, *head.parameters()]
    ours = token_log_probs.TokenLogProbs.apply(hidden, head.weight, head.bias, targets, 0.7)
    plain = (head(hidden) / 0.7).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(ours, plain)
    expected = torch.autograd.grad(plain, inputs, upstream)
    for _ in range(2):  # the second time, no logits are left
        gradients = torch.autograd.grad(ours, inputs, upstream, retain_graph=True)
        for a, b in zip(gradients, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_a_pass_keeps_as_many_logits_as_its_limit_allows_and_only_in_float32(monkeypatch):
    monkeypatch.setattr(token_log_probs, "VOCABULARY_BLOCK", 32)
    monkeypatch.setattr(token_log_probs, "KEPT_LOGITS", 2 * 8 * 32 * 4 + 1)
    hidden, weight, targets = torch.randn(8, 32), torch.randn(100, 32), torch.randint(100, (8,))

    def kept(dtype, trained):
        x, w = (t.to(dtype).requires_grad_(trained) for t in (hidden, weight))
        ctx = SimpleNamespace(needs_input_grad=(trained,) * 2, save_for_backward=lambda *tensors: None)
        token_log_probs.TokenLogProbs.forward(ctx, x, w, None, targets, 1.0)
        return list(ctx.kept)

    assert kept(torch.float32, trained=True) == [0, 32]
    assert kept(torch.float32, trained=False) == kept(torch.bfloat16, trained=True) == []


@pytest.mark.parametrize("path", ["hand-written", "general"])
def test_gradients_are_bit_identical_in_every_run_with_several_threads(monkeypatch, path):
    if path == "general":
        monkeypatch.setattr(llama, "is_supported", lambda model: False)
    policy = make_policy(hidden_size=128)
    ids, mask, actions = batch(lengths=[20] * 48, group_size=48)
    gradients = set()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for _ in range(12):
            policy.zero_grad()
            all_log_probs(policy, as_samples(ids, mask, actions, 48), 1.0, 48).sum().backward()
            gradients.add(b"".join(p.grad.numpy().tobytes() for p in policy.parameters()))
    finally:
        torch.set_num_threads(threads)
    assert len(gradients) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [True, False])
def test_the_gpus_gradients_of_the_head_equal_autograds(monkeypatch, dtype, with_bias):
    monkeypatch.setattr(token_log_probs, "VOCABULARY_BLOCK", 7)
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(5, 8, generator=g).to(dtype), torch.randn(20, 8, generator=g).to(dtype)
    bias = torch.randn(20, generator=g).to(dtype) if with_bias else None
    targets, upstream = torch.tensor([0, 6, 7, 19, 6]), torch.randn(5, generator=g)
    inputs = [x.float().clone().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    logits = torch.nn.functional.linear(*inputs) / 0.7
    log_probs = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    expected = torch.autograd.grad((log_probs * upstream).sum(), inputs)
    saved = (hidden, weight, bias, targets, logits.logsumexp(1).detach())
    needs = (True, True, with_bias, False, False)
    ctx = SimpleNamespace(saved_tensors=saved, temperature=0.7, needs_input_grad=needs)
    ours = token_log_probs._gradients_on_gpu(ctx, upstream[:, None] / 0.7)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for a, b in zip(ours, expected, strict=False):
        assert a.dtype == dtype
        torch.testing.assert_close(a.float(), b, atol=tolerance, rtol=tolerance)
    assert ours[3] is ours[4] is None
