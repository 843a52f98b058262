"""The hand-written pass over packed sequences against the model's own forward pass on each sequence."""

import pytest
import torch

from src import models
from src.engine import architecture, llama
from src.engine.linear import cat_weights
from src.engine.llama import Layout, packed_hidden
from tests.conftest import make_policy
from tests.test_decoder import MODELS

LENGTHS = [
    ([7, 5, 6], [[4, 1, 6], [3, 3], []]),
    ([3], [[5, 5]]),
    ([2, 9], [[], []]),
    ([4, 4], [[0, 0], [2, 0]]),
]


def one_by_one(model, ids, prompt_lengths, completion_lengths):
    """Hidden states in the order of the layout, each completion behind its own copy of the prompt."""
    prompts, start = ids[: sum(prompt_lengths)].split(prompt_lengths), sum(prompt_lengths)
    hidden = [model.base_model(prompt[None]).last_hidden_state[0] for prompt in prompts]
    for prompt, lengths in zip(prompts, completion_lengths, strict=True):
        for n in lengths:
            sequence = torch.cat([prompt, ids[start : start + n]])
            hidden.append(model.base_model(sequence[None]).last_hidden_state[0, len(prompt) :])
            start += n
    return torch.cat(hidden)


def compare_with_each_sequence(packed, model, layout, lengths):
    """Compare values and gradients of a packed pass with those of each sequence by itself.

    Returns:
        The random ids, and the pass's hidden states.
    """
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 80, (len(layout.positions),), generator=g)
    upstream = torch.randn(len(ids), 32, generator=g)
    results = []
    for hidden in (packed(model, ids, layout), one_by_one(model, ids, *lengths)):
        gradients = torch.autograd.grad((hidden * upstream).sum(), list(model.base_model.parameters()))
        results.append((hidden.detach(), gradients))
    (ours, our_gradients), (theirs, their_gradients) = results
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    for a, b in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5 * float(b.abs().max()), rtol=1e-4)
    return ids, ours


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(
    ("block_pairs", "chunk"), [(1, 2), (100, 4), (llama.BLOCK_PAIRS, llama.CHUNK_TOKENS)]
)
def test_values_and_gradients_equal_those_of_each_sequence_by_itself(
    monkeypatch, kind, lengths, block_pairs, chunk
):
    monkeypatch.setattr(llama, "BLOCK_PAIRS", block_pairs)
    monkeypatch.setattr(llama, "CHUNK_TOKENS", chunk)
    model = MODELS[kind]()
    assert llama.is_supported(model)
    layout = Layout.of(*lengths)
    ids, ours = compare_with_each_sequence(packed_hidden, model, layout, lengths)
    with torch.no_grad():
        torch.testing.assert_close(packed_hidden(model, ids, layout), ours, atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_checkpointing_changes_only_memory(dtype):
    layout, ids = Layout.of(*LENGTHS[0]), torch.arange(3, 38) % 80
    results = []
    for checkpointed in (False, True):
        model = make_policy(num_hidden_layers=4).to(dtype)
        if checkpointed:
            models.checkpoint_activations(model)
        hidden = packed_hidden(model, ids, layout)
        shared = hidden.grad_fn.shared
        parts = [*hidden.grad_fn.saved, (shared.cos, shared.sin)]
        kept = sum(t.nbytes for part in parts for t in part if t is not None)
        weights = list(model.base_model.parameters())
        results.append((kept, hidden, torch.autograd.grad(hidden.float().square().sum(), weights)))
    (all_kept, plain, gradients), (kept, again, recomputed) = results
    assert torch.equal(plain, again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, recomputed, strict=True))
    assert kept < 0.4 * all_kept


def test_in_bfloat16_values_and_gradients_are_as_close_to_float32_as_autograd():
    exact = make_policy(num_hidden_layers=6)
    rounded = make_policy(num_hidden_layers=6).bfloat16()
    exact.load_state_dict(rounded.state_dict())
    layout, lengths = Layout.of(*LENGTHS[0]), LENGTHS[0]
    ids = torch.randint(3, 80, (len(layout.positions),), generator=torch.Generator().manual_seed(0))

    def values_and_gradients(model, hidden):
        weights = list(model.base_model.parameters())
        gradients = torch.autograd.grad(hidden.float().square().sum(), weights)
        return [hidden.detach().float()], [g.float() for g in gradients]

    def error(tensors, expected):
        return sum(((a - b).norm() / b.norm()).item() for a, b in zip(tensors, expected, strict=True))

    values, gradients = values_and_gradients(exact, one_by_one(exact, ids, *lengths))
    our_values, our_gradients = values_and_gradients(rounded, packed_hidden(rounded, ids, layout))
    their_values, their_gradients = values_and_gradients(rounded, one_by_one(rounded, ids, *lengths))
    assert 0 < error(our_values, values) < error(their_values, values)  # our residual stream is float32
    assert 0 < error(our_gradients, gradients) < 1.2 * error(their_gradients, gradients)


def test_a_layout_equals_one_made_by_hand():
    layout = Layout.of([2, 3], [[1, 2], [2]])
    assert layout.positions.tolist() == [0, 1, 0, 1, 2, 2, 2, 3, 3, 4]
    assert [b.starts.tolist() for b in layout.blocks] == [[0, 2], [5, 6], [8]]
    assert [b.lengths.tolist() for b in layout.blocks] == [[2, 3], [1, 2], [2]]
    assert [b.prefix.tolist() for b in layout.blocks] == [[], [0, 1], [2, 3, 4]]
    native = layout.blocks[1].to_native(heads=4, kv_heads=2, head_dim=16)
    assert (native.count, native.longest, native.prefix_length, native.padded_keys) == (2, 2, 2, 32)


def test_adjacent_weights_are_concatenated_without_a_copy(policy):
    attention = policy.model.layers[0].self_attn
    parts = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    before, expected = cat_weights(*parts), torch.cat(parts)
    assert before.data_ptr() != parts[0].data_ptr()
    architecture.join_weights(policy)
    after = cat_weights(*parts)
    assert after.data_ptr() == parts[0].data_ptr()
    assert torch.equal(before, expected)
    assert torch.equal(after, expected)
    parts[1].data += 1.0  # as an optimizer step does
    assert torch.equal(cat_weights(*parts), torch.cat(parts))


def test_frozen_weights_get_no_gradient(policy):
    policy.model.embed_tokens.requires_grad_(False)
    layout = Layout.of([3], [[2, 2]])
    packed_hidden(policy, torch.arange(7), layout).sum().backward()
    assert policy.model.embed_tokens.weight.grad is None
    assert policy.model.layers[0].mlp.up_proj.weight.grad is not None
    policy.requires_grad_(False)
    assert not packed_hidden(policy, torch.arange(7), layout).requires_grad


def test_keys_and_values_equal_those_in_the_models_own_cache(policy):
    prompts = [[5, 6, 7], [8, 9, 10, 11]]
    layout = Layout.of([3, 4], [[], []])
    keys_values: list[torch.Tensor] = []  # of each layer
    with torch.no_grad():
        packed_hidden(policy, torch.tensor([5, 6, 7, 8, 9, 10, 11]), layout, keys_values)
        for prompt, part in zip(prompts, (slice(0, 3), slice(3, 7)), strict=True):
            cache = policy(torch.tensor([prompt]), use_cache=True).past_key_values
            for ours, layer in zip(keys_values, cache.layers, strict=True):
                theirs = torch.cat([layer.keys, layer.values], dim=1)[0].transpose(0, 1)
                torch.testing.assert_close(ours[part], theirs, atol=1e-5, rtol=1e-5)
