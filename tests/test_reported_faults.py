"""What public bug reports describe about trainers, tried on this one: each once went wrong here."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import train
from src import parallel
from src.engine.sampler import decode
from src.errors import InputError
from src.judge import plain_answer
from src.models import end_of_turn, stop_token_ids
from src.problems import read_problems, with_prompts
from src.reward_model import AceRewardModel
from src.run.checkpoint import checkpoints_of
from tests.conftest import as_samples, byte_tokenizer, make_policy
from tests.test_train import metrics_of


def save(folder: Path, tokenizer, model=None, **config) -> str:
    """A model's folder, with changes in its config.json."""
    (model or make_policy()).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return str(folder)


# ----------------------------------------------------------------------------------------------------------
# Chat templates and prompts


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0]['content'] + 1 }}", "rejects the conversation .TypeError"),
        ("{{ 1 // 0 }}", "rejects the conversation .ZeroDivisionError"),
        ("{{ raise_exception('no') }}", "rejects the conversation .TemplateError: no"),
        ("{% for", "rejects the conversation .TemplateSyntaxError"),
        ({"a": "{{ 1 }}", "b": "{{ 2 }}"}, "rejects the conversation .ValueError"),
        ("{% if false %}x{% endif %}", "renders this question as nothing"),
    ],
    ids=["type", "zero", "raises", "syntax", "no default", "nothing"],
)
def test_a_template_that_fails_in_any_way_is_one_message(
    template, message, tiny, tmp_path, reward_model_folder
):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    folder = save(tmp_path / "model", tokenizer)
    with pytest.raises(InputError, match=message):
        train.main(**tiny | dict(model_name=folder))
    if "nothing" not in message:
        judge = tmp_path / "judge"
        shutil.copytree(reward_model_folder, judge)
        (judge / "chat_template.jinja").unlink(missing_ok=True)
        tokenizer.save_pretrained(judge)
        with pytest.raises(InputError, match=r"--reward-model-name .*rejects the conversation"):
            AceRewardModel(str(judge), dtype=torch.float32)


def test_half_of_a_character_is_refused_in_data_and_in_the_system_prompt(tmp_path, tokenizer):
    file = tmp_path / "data.jsonl"
    file.write_text('{"question": "\\ud83d smile", "answer": "1"}\n')
    with pytest.raises(InputError, match=r"line 1: 'question' has half of a character .*\\ud83d.*remove it"):
        read_problems(str(file), "--data")
    file.write_text('{"question": "\\ud83d\\ude00 smile", "answer": "1"}\n')
    problems = read_problems(str(file), "--data")
    assert problems[0].question == "😀 smile"
    with pytest.raises(InputError, match=r"--system-prompt .*half of a character"):
        with_prompts(problems, tokenizer, "be \ud83d", 100)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_an_answer_that_nothing_equals_is_refused(number, tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text(f'{{"question": "q", "answer": {number}}}\n')
    with pytest.raises(InputError, match=r"line 1: 'answer' is .*finite number"):
        read_problems(str(file), "--data")


def test_a_file_of_another_trainer_is_refused_with_the_way_to_convert_it(tmp_path):
    file = tmp_path / "data.json"
    file.write_text('[{"question": "q",\n "answer": "1"}]')
    with pytest.raises(InputError, match=r"it is a JSON array; write each .* object on a line of its own"):
        read_problems(str(file), "--data")
    file.write_text('{"problem": "q", "solution": "1"}\n')
    with pytest.raises(InputError, match=r"no 'question'.*this one has 'problem', 'solution'"):
        read_problems(str(file), "--data")


def test_a_token_beyond_the_embedding_is_refused(tiny, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["What is"])
    folder = save(tmp_path / "model", tokenizer)
    message = "its prompts contain token 259 .*has only 259 tokens; call model.resize_token_embeddings"
    with pytest.raises(InputError, match=message):
        train.main(**tiny | dict(model_name=folder))


# ----------------------------------------------------------------------------------------------------------
# What judging sees


def test_special_tokens_that_are_part_of_an_answer_are_judged():
    """<answer> as a special token once vanished before judging, so every answer was wrong."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<answer>", "</answer>"]})
    tokenizer.pad_token = "<unk>"
    text = "so <answer>7</answer>"
    ids = torch.tensor([[*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]])
    samples = as_samples(
        torch.cat([torch.tensor([[5]]), ids, torch.zeros(1, 2, dtype=torch.long)], dim=1),
        torch.tensor([[True] * (ids.shape[1] + 1) + [False] * 2]),
        torch.tensor([[True] * ids.shape[1] + [False] * 2]),
    )
    assert decode(tokenizer, samples) == [text]


@pytest.mark.parametrize(
    "response", ["20 / 4", "20/4", "To convert 20 / 4, you simply divide", r"\boxed{20/4}"]
)
def test_a_question_copied_as_its_own_answer_gets_the_lowest_score(response):
    """The judge once evaluated it, and gave it the highest score, while the verifier said wrong."""
    assert plain_answer("What is 20 / 4?", response) is None
    assert plain_answer("What is 3 plus 2?", "20 / 4") == "5"


def test_a_turns_end_in_the_template_ends_a_completion(capsys):
    """TRL #3299: the base model's end token is another one, so completions went on to the length limit."""
    tokenizer, model = byte_tokenizer(), make_policy()
    model.generation_config.eos_token_id = 2
    assert stop_token_ids(model, tokenizer) == [2] and capsys.readouterr().out == ""
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>", "<|im_end|>2"]})
    tokenizer.chat_template = tokenizer.chat_template.replace("</s>", "<|im_end|>")
    assert stop_token_ids(model, tokenizer) == [2, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert "completions also end at '<|im_end|>'" in capsys.readouterr().out
    for template in ("{{ messages[-1]['content'] }} or so</s>", "{{ raise_exception('no answers') }}"):
        tokenizer.chat_template = template
        assert end_of_turn(tokenizer) is None


# ----------------------------------------------------------------------------------------------------------
# Sampling and training


@pytest.mark.parametrize(
    "settings",
    [dict(top_k=1, repetition_penalty=5.0, do_sample=True), dict(temperature=0.01, do_sample=True)],
    ids=["top_k and repetition_penalty", "temperature"],
)
def test_the_generation_configs_own_sampling_changes_nothing(settings, tiny, tmp_path, tokenizer):
    """Trainers that sample through generate() draw from another distribution than they train on."""
    runs = {}
    for name, changes in (("plain", {}), ("changed", settings)):
        model = make_policy()
        for key, value in changes.items():
            setattr(model.generation_config, key, value)
        folder = save(tmp_path / name, tokenizer, model)
        runs[name] = train.main(**tiny | dict(model_name=folder, run_name=name, max_steps=1))
    assert (runs["plain"] / "rollouts.jsonl").read_bytes() == (
        runs["changed"] / "rollouts.jsonl"
    ).read_bytes()


def test_dropout_in_the_configuration_is_off_in_sampling_and_training(tiny, tmp_path, tokenizer):
    folder = save(tmp_path / "model", tokenizer, attention_dropout=0.9)
    run = train.main(**tiny | dict(model_name=folder, dtype="float32", max_steps=1))
    assert metrics_of(run)[0]["policy/sampler_gap"] < 1e-5


def test_completions_of_a_single_token_train(tiny):
    """unsloth #1817: a completion without a token before the end failed in argmax."""
    run = train.main(**tiny | dict(max_new_tokens=1, max_steps=1))
    assert metrics_of(run)[0]["completion/len_mean"] == 1


def test_a_resumed_run_uses_the_learning_rate_that_it_is_given(tiny):
    """robosat #169: the saved optimizer's learning rate replaced it."""
    run = train.main(**tiny | dict(max_steps=1, lr=1e-4))
    train.main(resume=str(run), max_steps=3, lr=3e-4)
    assert [line["optim/lr"] for line in metrics_of(run)] == [1e-4, 3e-4, 3e-4]


# ----------------------------------------------------------------------------------------------------------
# Environments


def test_a_dated_template_is_not_resumed_silently(tiny, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%H%M%S%f') }} " + tokenizer.chat_template
    folder = save(tmp_path / "model", tokenizer)
    run = train.main(**tiny | dict(model_name=folder, max_steps=1))
    with pytest.raises(InputError, match="their prompts have changed since the run began: the chat template"):
        train.main(resume=str(run), max_steps=2)
    train.main(resume=str(run), max_steps=2, system_prompt="Think.")  # other prompts were asked for


@pytest.mark.parametrize(
    "config",
    [dict(output_attentions=True), dict(output_hidden_states=True), dict(return_dict=False)],
    ids=str,
)
def test_a_configuration_that_asks_for_other_outputs_changes_nothing(config, tiny, tmp_path, tokenizer):
    folder = save(tmp_path / "model", tokenizer, **config)
    run = train.main(**tiny | dict(model_name=folder, max_steps=1))
    assert [path.name for path in checkpoints_of(run)] == ["step_1"]


@pytest.mark.parametrize("error", [ValueError("odd"), RuntimeError("no"), KeyError("key")], ids=repr)
def test_no_error_while_saving_ends_a_run(error, tiny, monkeypatch, capsys):
    from transformers import PreTrainedModel

    real, calls = PreTrainedModel.save_pretrained, []

    def save_pretrained(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            raise error
        return real(self, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save_pretrained)
    run = train.main(**tiny | dict(checkpoint_interval=1, max_steps=2))
    out = capsys.readouterr().out
    assert f"checkpoint step_1 could not be written ({type(error).__name__}" in out
    assert [path.name for path in checkpoints_of(run)] == ["step_2"]


def test_accelerates_own_settings_are_refused_unless_they_change_nothing(tiny, monkeypatch):
    for name, value in {
        "ACCELERATE_USE_FSDP": "true",
        "ACCELERATE_USE_DEEPSPEED": "1",
        "ACCELERATE_MIXED_PRECISION": "fp16",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    }.items():
        with pytest.raises(InputError, match=f"^{name}={value}: is not supported .*; unset it and use"):
            parallel.check_accelerate({name: value})
    harmless = dict(
        ACCELERATE_USE_FSDP="false", ACCELERATE_MIXED_PRECISION="no", ACCELERATE_DYNAMO_BACKEND="NO"
    )
    parallel.check_accelerate(harmless | dict(ACCELERATE_GRADIENT_ACCUMULATION_STEPS="1"))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="ACCELERATE_USE_FSDP"):
        train.main(**tiny)


def test_the_default_data_is_found_from_any_folder(tiny, tmp_path, monkeypatch):
    settings = tiny | dict(max_steps=1)
    del settings["data"]
    monkeypatch.chdir(tmp_path)
    assert metrics_of(train.main(**settings))[0]["step"] == 0
