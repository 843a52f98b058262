"""The reward model: the exact text it reads, and scores that depend on nothing but that text."""

import shutil

import pytest
import torch

from src.errors import InputError
from src.reward_model import AceRewardModel, choose_reward_model

SYSTEM = "Please reason step by step, and check your final answer within \\boxed{}."
RESPONSES = ["8", "5 + 3 = 8, so \\boxed{8}", "It is nine. " * 10, "", "8"]


@pytest.fixture(scope="module")
def reward_model(reward_model_folder):
    return AceRewardModel(str(reward_model_folder), dtype=torch.float32, batch_size=3)


def test_the_text_is_the_model_cards(reward_model):
    ids = reward_model.encode("What is 5 + 3?", "8")
    text = f"<|system|>\n{SYSTEM}</s>\n<|user|>\nWhat is 5 + 3?</s>\n<|assistant|>\n8</s>\n"
    assert reward_model.tokenizer.decode(ids) == text
    assert ids == reward_model.tokenizer.encode(text, add_special_tokens=False)


def by_hand(reward_model, prompt, response):
    """The score head at the last token of one conversation, without transformers' own pooling."""
    ids = torch.tensor([reward_model.encode(prompt, response)])
    with torch.no_grad():
        return reward_model.model.score(reward_model.model.model(ids).last_hidden_state[0, -1]).item()


def test_batched_scores_equal_single_ones_and_the_head_at_the_last_token(reward_model):
    scores = reward_model.compute_batch_reward("What is 5 + 3?", RESPONSES)
    assert scores.shape == (5,) and scores.dtype == torch.float32
    for response, score in zip(RESPONSES, scores.tolist(), strict=True):
        assert score == pytest.approx(reward_model.compute_reward("What is 5 + 3?", response), abs=1e-4)
        assert score == pytest.approx(by_hand(reward_model, "What is 5 + 3?", response), abs=1e-4)
    assert scores[0] == scores[4]
    assert len(set(scores.tolist())) == 4


def test_a_question_for_each_response(reward_model):
    prompts = ["a?", "b?", "c?"]
    scores = reward_model.compute_batch_reward(prompts, ["8", "8", "8"])
    for prompt, score in zip(prompts, scores.tolist(), strict=True):
        assert score == pytest.approx(by_hand(reward_model, prompt, "8"), abs=1e-4)
    with pytest.raises(ValueError, match="zip"):
        reward_model.compute_batch_reward(["a?"], ["8", "8"])


def test_a_long_response_loses_its_start(reward_model_folder):
    short = AceRewardModel(str(reward_model_folder), dtype=torch.float32, max_length=150)
    ids = short.encode("What is 5 + 3?", "wrong " * 50 + "right 8")
    text = short.tokenizer.decode(ids)
    assert len(ids) == 150
    assert text.startswith(f"<|system|>\n{SYSTEM}</s>\n<|user|>\nWhat is 5 + 3?</s>\n<|assistant|>\n")
    assert text.endswith("right 8</s>\n")


@pytest.mark.parametrize("fault", ["raises", "nan"])
def test_a_batch_that_fails_scores_zero_and_is_counted(reward_model_folder, monkeypatch, capsys, fault):
    model = AceRewardModel(str(reward_model_folder), dtype=torch.float32, batch_size=2)
    good = model.compute_batch_reward("q", RESPONSES)
    forward, calls = model._forward, []

    def faulty(encoded):
        calls.append(len(encoded))
        if len(calls) == 2:
            if fault == "raises":
                raise torch.OutOfMemoryError("CUDA out of memory")
            return torch.full((len(encoded),), torch.nan)
        return forward(encoded)

    monkeypatch.setattr(model, "_forward", faulty)
    scores = model.compute_batch_reward("q", RESPONSES)
    assert model.failed == 2
    assert (scores == 0).sum() == 2 and (scores == good).sum() == 3
    if fault == "raises":
        assert "out of memory" in capsys.readouterr().out


def test_what_is_not_a_reward_model_is_refused(policy_folder, tmp_path):
    with pytest.raises(InputError, match=r"not a reward model.*score"):
        AceRewardModel(str(policy_folder))
    with pytest.raises(InputError, match="no such folder"):
        AceRewardModel(str(tmp_path / "none"))


def test_auto_says_which_and_why():
    cpu = torch.device("cpu")
    dtype = torch.bfloat16
    assert choose_reward_model("auto", "embedded", 10, cpu, dtype)[0] is None
    name, why = choose_reward_model("auto", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", 10, cpu, dtype)
    assert name is None and "needs a GPU" in why
    assert choose_reward_model("none", "x", 10, cpu, dtype)[0] is None
    assert choose_reward_model("some/model", "x", 10, cpu, dtype)[0] == "some/model"


@pytest.mark.parametrize(
    ("card_gb", "dtype", "expected"),
    [(48, torch.bfloat16, True), (40, torch.bfloat16, False), (48, torch.float32, False), (80, torch.float32, True)],
)
def test_auto_weighs_what_is_still_to_come_against_what_is_free(monkeypatch, card_gb, dtype, expected):
    """TinyLlama in bfloat16 has 8 bytes a weight loaded (compute, reference, master); in float32 too (itself, reference)."""
    free = card_gb * 10**9 - 8 * 1_100_000_000
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, card_gb * 10**9))
    name, why = choose_reward_model("auto", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", 1_100_000_000, torch.device("cuda"), dtype)
    assert (name is not None) == expected and f"{free / 1e9:.0f} GB are free" in why


def test_a_template_without_a_system_role_is_refused_or_used_without(reward_model_folder, tokenizer, tmp_path):
    folder = tmp_path / "rm"
    shutil.copytree(reward_model_folder, folder)
    (folder / "chat_template.jinja").write_text(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + tokenizer.chat_template
    )
    with pytest.raises(InputError, match="no system role"):
        AceRewardModel(str(folder))
    plain = AceRewardModel(str(folder), system_prompt=None)
    assert plain.tokenizer.decode(plain.encode("q", "8")) == "<|user|>\nq</s>\n<|assistant|>\n8</s>\n"
