"""The reward model: the exact text it reads, scores that depend only on that text, and where it is placed."""

import shutil
from contextlib import contextmanager

import pytest
import torch
from tokenizers import processors
from transformers import BertConfig, BertForSequenceClassification, Qwen2ForSequenceClassification

import train
from src.engine.memory_plan import Plan
from src.engine.model_size import ModelSize
from src.engine.offload import pin
from src.errors import InputError
from src.placement import choose_reward_model, load_reward_model
from src.reward_model import ACEMATH_SYSTEM_PROMPT, AceRewardModel, is_causal, reward_model_bytes

SYSTEM = "Please reason step by step, and check your final answer within \\boxed{}."
RESPONSES = ["8", "5 + 3 = 8, so \\boxed{8}", "It is nine. " * 10, "", "8"]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# Qwen 2's chat template. AceMath's is the same for messages without tools.
CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
)


@pytest.fixture
def reward_model(reward_model_folder):
    return AceRewardModel(str(reward_model_folder), dtype=torch.float32, batch_tokens=500)


def with_tokenizer(reward_model_folder, tokenizer, path) -> AceRewardModel:
    """The reward model, loaded from a copy at `path` that has another tokenizer."""
    shutil.copytree(reward_model_folder, path)
    tokenizer.save_pretrained(path)
    return AceRewardModel(str(path), dtype=torch.float32)


def test_the_text_is_the_one_on_the_model_card(reward_model_folder, tokenizer, tmp_path):
    """AceMath-7B-RM's card ("How to use") renders the template without a generation prompt, then encodes."""
    tokenizer = type(tokenizer).from_pretrained(reward_model_folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    model = with_tokenizer(reward_model_folder, tokenizer, tmp_path / "rm")
    assert SYSTEM == ACEMATH_SYSTEM_PROMPT
    ids = model.encode("What is 5 + 3?", " 5 + 3 = \\boxed{8}\n")
    expected = (
        "<|im_start|>system\n"
        "Please reason step by step, and check your final answer within \\boxed{}.<|im_end|>\n"
        "<|im_start|>user\nWhat is 5 + 3?<|im_end|>\n<|im_start|>assistant\n 5 + 3 = \\boxed{8}\n<|im_end|>\n"
    )
    assert model.tokenizer.decode(ids).encode() == expected.encode()
    start, end = model.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert (ids.count(start), ids.count(end)) == (3, 3)


def test_special_tokens_that_the_tokenizer_adds_are_not_doubled(reward_model_folder, tokenizer, tmp_path):
    tokenizer = type(tokenizer).from_pretrained(reward_model_folder)
    template = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer.backend_tokenizer.post_processor = template
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    assert tokenizer.encode("x")[0] == 1
    ids = with_tokenizer(reward_model_folder, tokenizer, tmp_path / "rm").encode("q", "8")
    assert ids[0] == 1 and ids.count(1) == 1
    assert ids.count(2) == 3  # one per turn


def by_hand(reward_model, prompt, response):
    """The score head applied to the last token of one conversation, without transformers' own pooling."""
    ids = torch.tensor([reward_model.encode(prompt, response)])
    with torch.no_grad():
        return reward_model.model.score(reward_model.model.model(ids).last_hidden_state[0, -1]).item()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_tokens", [200, 2000, 20000])
def test_batched_scores_equal_single_ones_and_the_head_at_the_last_token(
    reward_model_folder, side, batch_tokens
):
    model = AceRewardModel(str(reward_model_folder), dtype=torch.float32, batch_tokens=batch_tokens)
    model.tokenizer.padding_side = side
    responses = [f"{'word ' * (7 * i % 61)}so the answer is {i}" for i in range(32)]
    scores = model.compute_batch_reward("What is 5 + 3?", responses)
    assert scores.shape == (32,) and scores.dtype == torch.float32
    for response, score in zip(responses, scores.tolist(), strict=True):
        assert score == pytest.approx(model.compute_reward("What is 5 + 3?", response), abs=1e-5)
        assert score == pytest.approx(by_hand(model, "What is 5 + 3?", response), abs=1e-5)
    assert len(set(scores.tolist())) == 32


def test_each_response_can_have_its_own_question(reward_model):
    prompts = ["a?", "b?", "c?"]
    scores = reward_model.compute_batch_reward(prompts, ["8", "8", "8"])
    for prompt, score in zip(prompts, scores.tolist(), strict=True):
        assert score == pytest.approx(by_hand(reward_model, prompt, "8"), abs=1e-5)
    with pytest.raises(ValueError, match="zip"):
        reward_model.compute_batch_reward(["a?"], ["8", "8"])


def recorded(reward_model, monkeypatch) -> list[list]:
    """The list of batches that go through the model from now on."""
    forward, batches = reward_model._forward, []
    monkeypatch.setattr(reward_model, "_forward", lambda texts: batches.append(texts) or forward(texts))
    return batches


def test_batches_contain_each_text_once_and_stay_within_batch_tokens(reward_model, monkeypatch):
    batches = recorded(reward_model, monkeypatch)
    scores = reward_model.score_texts("q", [*RESPONSES, "x" * 900, *RESPONSES])
    flat = [text for batch in batches for text in batch]
    assert len(flat) == len(set(flat)) == 5
    assert scores[0] == scores[4] == scores[6]
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(map(len, batch)) <= 500
    assert max(map(len, batches)) > 1
    assert not reward_model.model.training and not scores.requires_grad
    assert not any(p.requires_grad for p in reward_model.model.parameters())


def test_a_long_response_loses_its_start(reward_model_folder):
    short = AceRewardModel(str(reward_model_folder), dtype=torch.float32, max_length=150)
    ids = short.encode("What is 5 + 3?", "wrong " * 50 + "right 8")
    text = short.tokenizer.decode(ids)
    assert len(ids) == 150
    assert text.startswith(f"<|system|>\n{SYSTEM}</s>\n<|user|>\nWhat is 5 + 3?</s>\n<|assistant|>\n")
    assert text.endswith("right 8</s>\n")
    assert short.truncated == 1
    assert len(short.encode("a question that is itself too long " * 9, "right 8")) == 150
    assert short.tokenizer.decode(short.encode("too long " * 99, "right 8")).endswith("right 8</s>\n")
    assert short.truncated == 3
    short.score_texts("What is 5 + 3?", ["8", "long " * 50, "8"])
    assert short.truncated == 4


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_running_out_of_memory_halves_the_batch(reward_model_folder, monkeypatch, capsys, error):
    model = AceRewardModel(str(reward_model_folder), dtype=torch.float32)
    responses = [str(i) * (i + 1) for i in range(9)]
    good = model.score_texts("q", responses)
    forward = model._forward

    def small_card(texts):
        if len(texts) > 2:
            raise error
        return forward(texts)

    monkeypatch.setattr(model, "_forward", small_card)
    torch.testing.assert_close(model.score_texts("q", responses), good, atol=1e-5, rtol=0)
    assert model.failed == 0 and model.batch_tokens < 1000
    assert "not enough memory to score 9 texts at once" in capsys.readouterr().out
    calls = recorded(model, monkeypatch)
    model.score_texts("q", responses[:4])
    assert max(map(len, calls)) <= 4  # later batches start small


@pytest.mark.parametrize("fault", ["raises", "out of memory", "nan", "inf"])
def test_responses_that_cannot_be_scored_get_0_and_are_counted(
    reward_model_folder, monkeypatch, capsys, fault
):
    model = AceRewardModel(str(reward_model_folder), dtype=torch.float32)
    good = model.compute_batch_reward("q", RESPONSES)
    forward, longest = model._forward, max(model.encode("q", r) for r in RESPONSES)

    def faulty(texts):
        if longest in texts:
            if fault == "out of memory":
                raise torch.OutOfMemoryError("CUDA out of memory.")
            if fault == "raises" and len(texts) == 1:
                raise IndexError("index out of range in self")
            if fault in ("nan", "inf"):
                failing = torch.tensor([text == longest for text in texts])
                return torch.where(failing, torch.tensor(float(fault)), forward(texts))
        return forward(texts)

    monkeypatch.setattr(model, "_forward", faulty)
    model.batch_tokens = 1  # one by one
    scores = model.compute_batch_reward("q", RESPONSES)
    assert model.failed == 1
    torch.testing.assert_close(scores, torch.where(scores == 0, 0.0, good), atol=1e-5, rtol=0)
    assert (scores == 0).sum() == 1
    if fault in ("raises", "out of memory"):
        assert "failed on 1 texts" in capsys.readouterr().out


def test_a_model_without_a_score_head_or_a_missing_folder_is_refused(policy_folder, tmp_path):
    with pytest.raises(InputError, match=r"not a reward model.*score"):
        AceRewardModel(str(policy_folder))
    with pytest.raises(InputError, match="no such folder"):
        AceRewardModel(str(tmp_path / "none"))


def test_a_template_without_a_system_role_works_only_without_a_system_prompt(
    reward_model_folder, tokenizer, tmp_path
):
    folder = tmp_path / "rm"
    shutil.copytree(reward_model_folder, folder)
    (folder / "chat_template.jinja").write_text(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + tokenizer.chat_template
    )
    with pytest.raises(InputError, match="no system role"):
        AceRewardModel(str(folder))
    plain = AceRewardModel(str(folder), system_prompt=None)
    assert plain.tokenizer.decode(plain.encode("q", "8")) == "<|user|>\nq</s>\n<|assistant|>\n8</s>\n"


# ----------------------------------------------------------------------------------------------------------
# Placement


def test_an_offloaded_model_scores_the_same_and_stays_on_the_host(reward_model_folder, reward_model):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AceRewardModel(str(reward_model_folder), device, torch.float32, offload=True)
    homes = [weight.data_ptr() for weight in model.model.parameters()]
    torch.testing.assert_close(
        model.score_texts("q", RESPONSES), reward_model.score_texts("q", RESPONSES), atol=1e-5, rtol=0
    )
    assert [w.data_ptr() for w in model.model.parameters()] == homes
    assert {w.device.type for w in model.model.parameters()} == {"cpu"}


def test_offloading_without_room_on_the_device_scores_nothing(reward_model_folder, monkeypatch, capsys):
    model = AceRewardModel(str(reward_model_folder), dtype=torch.float32, offload=True)

    @contextmanager
    def no_room():
        raise torch.OutOfMemoryError("CUDA out of memory.")
        yield

    monkeypatch.setattr(model.offloaded, "on_device", no_room)
    assert model.score_texts("q", RESPONSES).isnan().all()
    assert model.failed == 5 and "could not be moved" in capsys.readouterr().out


def test_int8_without_bitsandbytes_is_refused_and_says_how_to_install_it(reward_model_folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs bitsandbytes.*pip install bitsandbytes==0\.50\.2"):
        AceRewardModel(str(reward_model_folder), load_in_8bit=True)


def test_int8_scores_are_close_and_only_linear_layers_are_int8(reward_model_folder, reward_model):
    pytest.importorskip("bitsandbytes")
    model = AceRewardModel(str(reward_model_folder), dtype=torch.float32, load_in_8bit=True)
    exact, rounded = reward_model.score_texts("q", RESPONSES), model.score_texts("q", RESPONSES)
    assert 0 < (exact - rounded).abs().max() < 0.05 * exact.abs().max()
    assert model.model.model.layers[0].mlp.up_proj.weight.dtype == torch.int8
    assert model.model.score.weight.dtype == torch.float32


def test_the_size_of_a_reward_model_comes_from_its_configuration(reward_model_folder):
    name = str(reward_model_folder)
    model = Qwen2ForSequenceClassification.from_pretrained(name)
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not model.score]
    linear = sum(layer.weight.numel() for layer in layers)
    assert reward_model_bytes(name, torch.float32, False)[0] == 4 * model.num_parameters()
    assert reward_model_bytes(name, torch.bfloat16, False)[0] == 2 * model.num_parameters()
    assert reward_model_bytes(name, torch.float32, True)[0] == 4 * model.num_parameters() - 3 * linear
    assert reward_model_bytes("embedded", torch.bfloat16, False)[0] == 2 * 134_515_008


def plan(device: str) -> Plan:
    """A run that needs the program's share, 2 GB that stay, 2 of the reference, and 4 during the update."""
    policy = ModelSize(
        weights=10**9, trained=0, largest=0, itemsize=2, activation=4e6, checkpointed=4e6, recomputed=0.0,
        backward=0.0, forward=0.0, cache=0.0, hidden=0, vocabulary=0,
    )  # fmt: skip
    return Plan(policy, device, 1000, 1, 1000, 0, 1, reference=True)


def choose(
    free_gb=100.0,
    host_gb=100.0,
    requested="auto",
    placement="auto",
    eight_bit=False,
    policy="some/model",
    device=CUDA,
):
    free, host_free, memory = free_gb * 1e9, host_gb * 1e9, plan(device.type)
    flags = (requested, placement, eight_bit)
    return choose_reward_model(*flags, policy, memory, device, torch.bfloat16, free, host_free)[0]


@pytest.fixture
def acemath_of_14_gb(monkeypatch):
    """Make every reward model as large as AceMath-7B-RM, so that the hub is not needed."""

    def size(name, dtype, eight_bit):
        return 7e9 * (1 if eight_bit else dtype.itemsize), 0.0, 2e9

    monkeypatch.setattr("src.placement.reward_model_bytes", size)


@pytest.mark.parametrize(
    ("free_gb", "host_gb", "requested", "expected"),
    [
        (24, 99, "auto", "device"),  # 0.8 + 2 + 2 + 4 + 14 = 22.8
        (22, 99, "auto", "device"),  # the reference is in host memory: 20.8
        (20, 99, "auto", "offload"),  # 0.8 + 2 + 14 = 16.8
        (15, 99, "auto", "stream"),  # 0.8 + 2 + 4 = 6.8, and 0.8 + 2 + 2 while it scores
        (20, 10, "auto", None),
        (6, 99, "auto", None),
        (15, 5, "some/reward-model", "device"),  # fits nowhere; check_fits refuses it
        (24, 1, "some/reward-model", "device"),
        (19.5, 15, "some/reward-model", "offload"),
        (13, 99, "some/reward-model", "stream"),
        (6.5, 99, "some/reward-model", "stream"),  # may fit, if completions are short
    ],
)
def test_auto_chooses_the_first_place_with_room(acemath_of_14_gb, free_gb, host_gb, requested, expected):
    choice = choose(free_gb, host_gb, requested)
    assert (choice.placement if choice.name else None) == expected
    if choice.name is None:
        assert f"{free_gb:.1f} GB are free" in choice.why and "need up to" in choice.why
    elif expected == "cpu":
        assert choice.device == CPU
    else:
        assert choice.device == CUDA and choice.dtype == torch.bfloat16


def test_a_requested_placement_is_used_whatever_is_free(acemath_of_14_gb):
    assert choose(1, 1, "x", "cuda").placement == "device"
    assert choose(99, 99, "x", "offload").placement == "offload"
    assert choose(99, 99, "x", "cpu").device == CPU
    assert choose(99, 1, "x", "cpu").device == CPU
    assert choose(99, 1, "auto", "cpu").name is None
    assert choose(99, 99, "x", "cpu", device=CPU).placement == "device"
    assert choose(15, 99, "x", "offload").placement == "stream"
    assert choose(99, 99, "x", eight_bit=True).weights == 7e9
    assert choose(12, 99, "x", eight_bit=True).placement == "cpu"  # int8 is not offloaded
    for placement in ("cuda", "offload"):
        with pytest.raises(InputError, match=f"--reward-model-device {placement}: this run is on cpu"):
            choose(99, 99, "x", placement, device=CPU)


def test_a_choice_has_a_reason_and_impossible_ones_are_refused():
    assert choose(policy="embedded", device=CPU).name == "embedded"
    choice = choose(policy="TinyLlama/TinyLlama-1.1B-Chat-v1.0", device=CPU)
    assert choice.name is None and "needs a GPU" in choice.why
    assert choose(requested="none").name is None
    with pytest.raises(InputError, match="no int8 version"):
        choose(requested="embedded", eight_bit=True)
    with pytest.raises(InputError, match="--reward-model-8bit"):
        train.main(reward_model_8bit=True, reward_model_device="offload")


def test_a_reward_model_that_cannot_be_found_causes_a_warning_with_the_reason(capsys):
    choice = choose(requested="./nowhere")
    assert choice.failed and load_reward_model(choice, "hybrid") is None
    warning = "warning: there is no reward model, so only the verifier decides: --reward-model-name ./nowhere"
    assert warning in capsys.readouterr().out


def test_memory_that_cannot_be_pinned_does_not_fail_the_next_kernel(monkeypatch):
    """A dropped return code once surfaced at the next kernel launch."""
    pending = [False]

    class Cudart:
        def cudaHostRegister(self, address, size, flags):
            pending[0] = True
            return 2

    def zeros(*_, **__):
        pending[0] = False
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "cudart", Cudart)
    tensor = torch.ones(3)
    monkeypatch.setattr(torch, "zeros", zeros)
    pin(tensor, CUDA)
    assert pending == [False]


def test_only_models_that_look_back_are_scored_without_a_mask(reward_model):
    assert is_causal(reward_model.model)
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    assert not is_causal(BertForSequenceClassification(config))
    assert not is_causal(torch.nn.Linear(2, 2))
