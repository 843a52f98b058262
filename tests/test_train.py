"""main() on tiny random models: complete runs, the files they write, and requests that cannot work."""

import inspect
import json
import math
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from src import models, placement
from src.errors import InputError
from src.hub import TINYLLAMA
from src.hybrid_reward import combine_hybrid_score, get_final_reward, get_our_final_reward
from src.problems import read_problems
from src.report.page import meanings
from src.run.log import RunLog, choose_folder
from src.run.resume import defaults_of
from tests.conftest import ROOT, make_policy


def metrics_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def rollouts_of(run: Path) -> list[dict]:
    # Not splitlines: completions contain any character.
    return [json.loads(line) for line in (run / "rollouts.jsonl").open()]


def without_times(rows: list[dict], prefixes=("time/",)) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith(prefixes)} for row in rows]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


# ------------------------------------------------------------------------------------------ complete runs


def test_a_run_changes_the_policy_but_not_the_reference_or_the_reward_model(
    tiny, policy_folder, reward_model_folder, monkeypatch
):
    kept = {}
    frozen_copy, load_reward_model = models.frozen_copy, placement.load_reward_model

    def keep_reference(model):
        kept["reference"] = frozen_copy(model)
        return kept["reference"]

    def keep_reward_model(*args):
        kept["reward_model"] = load_reward_model(*args)
        kept["before"] = {k: v.clone() for k, v in kept["reward_model"].model.state_dict().items()}
        return kept["reward_model"]

    monkeypatch.setattr(models, "frozen_copy", keep_reference)
    monkeypatch.setattr(placement, "load_reward_model", keep_reward_model)
    changed = dict(reward_model_name=str(reward_model_folder), dtype="float32", checkpoint_interval=1)
    run = train.main(**tiny | changed)
    before, after = weights(policy_folder), weights(run / "step_2")
    for name in before:
        assert not torch.equal(before[name], after[name]), name
        torch.testing.assert_close(kept["reference"].state_dict()[name], before[name], rtol=0, atol=0)
    for name, value in kept["reward_model"].model.state_dict().items():
        assert torch.equal(value, kept["before"][name]), name
    names = ["config.json", "metrics.jsonl", "rollouts.jsonl", "step_1", "step_2"]
    assert sorted(p.name for p in run.iterdir()) == names


def test_a_run_prints_the_lines_that_users_know(tiny, reward_model_folder, capsys):
    run = train.main(**tiny | dict(reward_model_name=str(reward_model_folder)))
    out = capsys.readouterr().out
    for line in (
        r"Loading TinyLlama model\.\.\.",
        r"Loading reward model and math verifier\.\.\.",
        r"found 16 matching prompts",
        r"Running warmup to determine reward model bounds\.\.\.",
        r"rollout q='.+', a='\d+', returns=-?\d+\.\d\d, replay_buffer_size=4",
        r"rollout q='.+', a='\d+', returns=-?\d+\.\d\d, replay_buffer_size=8",
        r"returns of step 0: -?\d+\.\d{4}",
        r"0: kl=\d\.\d{4}, grad_norm=\d+\.\d{4}",
        r"1: kl=\d\.\d{4}, grad_norm=\d+\.\d{4}",
    ):
        assert re.search(f"^{line}", out, re.MULTILINE), line
    bounds = re.search(r"^RM bounds: min=(-?\d+\.\d{4}), max=(-?\d+\.\d{4})$", out, re.MULTILINE)
    assert float(bounds[1]) < float(bounds[2])
    in_metrics = [metrics_of(run)[0][f"reward/rm_{end}"] for end in ("min", "max")]
    assert [float(bounds[1]), float(bounds[2])] == pytest.approx(in_metrics, abs=1e-4)


def test_without_a_gpu_auto_trains_the_bundled_model_and_a_resume_keeps_it(
    tiny, policy_folder, monkeypatch, capsys
):
    monkeypatch.setattr(placement, "EMBEDDED", str(policy_folder))  # in its place, because it is fast
    del tiny["model_name"]
    run = train.main(**tiny | dict(max_steps=1))
    out = capsys.readouterr().out
    assert "policy: the bundled model instead of TinyLlama (auto: the run is on the CPU)" in out
    assert "to train TinyLlama anyway: --model-name TinyLlama/TinyLlama-1.1B-Chat-v1.0" in out
    saved = json.loads((run / "config.json").read_text())
    assert saved["hyperparameters"]["model_name"] == str(policy_folder)
    monkeypatch.setattr(placement, "EMBEDDED", "must-not-be-chosen-again")
    train.main(resume=str(run), max_steps=2)
    assert "(auto" not in capsys.readouterr().out
    assert len(metrics_of(run)) == 2


@pytest.mark.parametrize(
    ("free", "reachable", "chosen", "line"),
    [
        (80e9, True, TINYLLAMA, "policy: TinyLlama/TinyLlama-1.1B-Chat-v1.0 (auto)"),
        (1e3, True, "embedded", r"(auto: it needs 0.8 GB, and 0.0 GB are free on cuda)"),
        (80e9, False, "embedded", "(auto: it cannot be loaded: no hub)"),
    ],
)
def test_auto_trains_tinyllama_if_a_gpu_has_room(monkeypatch, capsys, free, reachable, chosen, line):
    def skeleton(*_):
        if not reachable:
            raise InputError("no hub")
        return make_policy()

    monkeypatch.setattr(models, "policy_skeleton", skeleton)
    monkeypatch.setattr(placement, "free_memory", lambda device: free)
    args = SimpleNamespace(**defaults_of(train.main))
    assert placement.choose_policy(args, torch.device("cuda")) == chosen
    assert line in capsys.readouterr().out
    args.model_name = "some/model"
    assert placement.choose_policy(args, torch.device("cuda")) == "some/model"


def test_every_part_of_every_reward_is_recorded_and_adds_up(tiny, reward_model_folder):
    run = train.main(**tiny | dict(reward_model_name=str(reward_model_folder), dtype="float32"))
    rows = rollouts_of(run)
    assert len(rows) == 16
    low, high = (metrics_of(run)[0][f"reward/rm_{end}"] for end in ("min", "max"))
    for row in rows:
        clamped = min(max(row["rm_score"], low), high)
        r_hat = combine_hybrid_score(float(row["correct"]), clamped, low, high, 0.01, 0.5, 0.5)
        assert row["r_hat"] == pytest.approx(r_hat, abs=1e-5)
        assert row["reward"] == pytest.approx(row["weight"] * row["r_hat"], abs=1e-6)
    for step, line in enumerate(metrics_of(run)):
        groups = [[r for r in rows if r["step"] == step][i : i + 4] for i in (0, 4)]
        for group in groups:
            clamped = torch.tensor([min(max(r["rm_score"], low), high) for r in group])
            assert group[0]["sigma_u"] == pytest.approx(clamped.std().item(), abs=1e-5)
        seen = [r["sigma_u"] for r in rows if r["step"] <= step][::4]
        sigma_bar = sum(seen) / len(seen)
        assert line["reward/sigma_bar"] == pytest.approx(sigma_bar, abs=1e-6)
        for row in groups[0] + groups[1]:
            expected = get_final_reward(row["r_hat"], sigma_bar, row["sigma_u"])
            assert row["reward"] == pytest.approx(expected, abs=1e-5)
        for group in groups:
            assert sum(r["advantage"] for r in group) == pytest.approx(0, abs=1e-5)


def test_two_runs_with_the_same_seed_write_identical_metrics_and_rollouts(tiny):
    runs = [train.main(**tiny | dict(run_name=name, eval_data=tiny["data"])) for name in ("a", "b")]
    assert without_times(metrics_of(runs[0])) == without_times(metrics_of(runs[1]))
    assert rollouts_of(runs[0]) == rollouts_of(runs[1])
    other = train.main(**tiny | dict(run_name="c", seed=7))
    assert rollouts_of(other) != rollouts_of(runs[0])


def test_evaluation_does_not_change_the_training(tiny):
    plain = train.main(**tiny)
    with_eval = train.main(**tiny | dict(run_name="eval", eval_data=tiny["data"], eval_interval=1))
    assert rollouts_of(plain) == rollouts_of(with_eval)
    a, b = weights(plain / "step_2"), weights(with_eval / "step_2")
    assert all(torch.equal(a[name], b[name]) for name in a)
    rows = metrics_of(with_eval)
    assert [row["step"] for row in rows] == [0, 1, 2]  # before each step, and after the last
    assert all(0 <= row["eval/accuracy"] <= 1 for row in rows)
    assert without_times(metrics_of(plain)) == without_times(rows, ("time/", "eval/"))[:2]


def test_a_checkpoint_is_a_folder_that_transformers_and_train_py_can_load(tiny):
    run = train.main(**tiny)
    folder = run / "step_2"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "What is 5 + 3?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    assert model.generate(**ids, max_new_tokens=5).shape[1] > ids.input_ids.shape[1]
    train.main(**tiny | dict(model_name=str(folder), run_name="again", max_steps=1))


def test_config_json_records_the_settings_and_the_versions(tiny):
    run = train.main(**tiny)
    config = json.loads((run / "config.json").read_text())
    for name, value in tiny.items():
        if name != "device":
            assert config["hyperparameters"][name] == value
    assert set(inspect.signature(train.main).parameters) < set(config["hyperparameters"])
    assert config["versions"]["torch"].startswith("2.13.0")


def test_each_epoch_covers_every_problem_once_in_a_new_order(tiny):
    changed = dict(
        max_steps=None, epochs=2, rollouts_per_step=8, group_size=2, train_batch_size=16, max_new_tokens=2
    )
    run = train.main(**tiny | changed)
    rows = rollouts_of(run)
    steps = [[r["question"] for r in rows if r["step"] == s][::2] for s in range(4)]
    assert len(metrics_of(run)) == 4
    assert len(set(steps[0] + steps[1])) == len(set(steps[2] + steps[3])) == 16
    assert steps[0] + steps[1] != steps[2] + steps[3]


def test_every_other_setting_works(tiny, reward_model_folder):
    """Every choice and switch that the other runs leave at its default."""
    changed = dict(
        reward_model_name=str(reward_model_folder), dtype="bfloat16", weight_decay=0.1, micro_batch_size=3,
        gradient_checkpointing=True, epochs_per_step=2, kl_weight=0.0, clip_eps=0.1, max_norm=0.5,
        advantage_scale="group", loss_normalizer="constant", top_p=0.9, temperature=1.3,
        system_prompt="Be brief.", reward_scorer="tanh", verifier_method="strict", alpha=0.3, beta=0.2,
        eps=0.1, w_min=0.1, w_max=3.0, k=2.0, warmup_samples=3, lr=1e-4,
    )  # fmt: skip
    run = train.main(**tiny | changed)
    for row in rollouts_of(run):
        expected = get_our_final_reward(row["r_hat"], 0, 0, w_min=0.1, w_max=3.0)
        assert row["reward"] == pytest.approx(expected, abs=1e-5)
    # Each group gets one optimizer step per pass. Without a KL term, groups with equal rewards are skipped.
    groups = [row["advantage"] for row in rollouts_of(run) if row["step"] == 0]
    with_gradient = sum(any(groups[i : i + 4]) for i in (0, 4))
    assert metrics_of(run)[0]["policy/updates"] == 2 * with_gradient > 0
    assert metrics_of(run)[0]["policy/kl"] == 0
    changed = dict(run_name="other", advantage_scale="none", loss_normalizer="sequence", max_steps=1)
    train.main(**tiny | changed)


def test_weights_and_biases_offline_needs_no_account(tiny, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = train.main(**tiny | dict(wandb_project="test", max_steps=1))
    assert list(run.glob("wandb/offline-run-*/*.wandb"))


def test_weights_and_biases_without_a_login_is_refused_before_anything_loads(tiny, monkeypatch):
    import wandb

    monkeypatch.setattr(wandb.setup().settings, "mode", "online")
    monkeypatch.setattr(type(wandb.api), "api_key", None)
    with pytest.raises(InputError, match="WANDB_MODE=offline"):
        train.main(**tiny | dict(wandb_project="test", model_name="would/fail"))


def test_an_unloadable_reward_model_gives_one_warning_and_a_verifier_only_run(tiny, tmp_path, capsys):
    run = train.main(**tiny | dict(reward_model_name=str(tmp_path / "nothing"), max_steps=1))
    out = capsys.readouterr().out
    assert out.count("warning: ") == 1
    assert "no such folder" in out and "only the verifier decides" in out
    assert {row["rm_score"] for row in rollouts_of(run)} == {0.0}
    assert {row["r_hat"] for row in rollouts_of(run)} <= {-0.5, 0.5}


def test_answers_that_no_completion_could_equal_are_refused_before_anything_loads(tiny, tmp_path):
    data = tmp_path / "data.jsonl"
    records = [
        {"question": "What is 1 + 1?", "answer": "2"},
        {"question": "Expand (x+1)^2.", "answer": "x^2 + 2x + 1"},
        {"question": "What is it?", "answer": "\\frac{"},
    ]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    message = r"data.jsonl, line 3: its answer .*frac.* cannot be compared: it is neither"
    with pytest.raises(InputError, match=message):
        train.main(**tiny | dict(data=str(data), model_name="/nowhere"))


@pytest.mark.parametrize("with_reward_model", [True, False])
def test_if_no_completion_has_an_answer_a_warning_comes_before_the_second_step(
    tiny, reward_model_folder, capsys, with_reward_model
):
    reward_model = str(reward_model_folder) if with_reward_model else "none"
    # Random bytes contain no marked answer.
    train.main(**tiny | dict(verifier_method="strict", reward_model_name=reward_model))
    lines = capsys.readouterr().out.splitlines()
    warnings = [i for i, line in enumerate(lines) if line.startswith("warning: none of the")]
    assert len(warnings) == 1
    assert "an <answer>, \\boxed{} or ####" in lines[warnings[0]]
    assert warnings[0] < next(i for i, line in enumerate(lines) if line.startswith("0: kl="))
    if with_reward_model:
        assert warnings[0] < next(i for i, line in enumerate(lines) if line.startswith("training for"))


def test_a_negative_tanh_weight_prints_a_warning(tiny, capsys):
    """tanh(-0.8^3) = -0.4716, so the weight of r_hat = -0.8 is 0.5 - 1.5 x 0.4716."""
    with pytest.raises(InputError):  # after the warning, and before anything loads
        train.main(**tiny | dict(reward_scorer="tanh", alpha=0.8, beta=0.2, data="nowhere.jsonl"))
    assert "the worst answers have the negative weight -0.21" in capsys.readouterr().out
    with pytest.raises(InputError):
        train.main(**tiny | dict(reward_scorer="tanh", alpha=0.7, beta=0.3, data="nowhere.jsonl"))
    assert "negative weight" not in capsys.readouterr().out


def test_overlapping_bands_print_a_warning(tiny, capsys):
    train.main(**tiny | dict(alpha=0.8, beta=0.5, max_steps=1))
    assert "bands overlap" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- bad input

BAD = [
    (dict(group_size=1), "--group-size 1: must be at least 2"),
    (dict(group_size=-8), "--group-size -8"),
    (dict(rollouts_per_step=0), "--rollouts-per-step 0: must be at least 1"),
    (dict(train_batch_size=0), "--train-batch-size 0"),
    (dict(train_batch_size=3), "--train-batch-size 3: must divide .* = 8 completions; for example 1"),
    (dict(train_batch_size=6), "for example 2"),
    (dict(micro_batch_size=-1), "--micro-batch-size -1"),
    (dict(max_length=0), "--max-length 0"),
    (dict(max_new_tokens=0), "--max-new-tokens 0: .*leave it out"),
    (dict(max_steps=0), "--max-steps 0"),
    (dict(epochs=0), "--epochs 0"),
    (dict(epochs_per_step=0), "--epochs-per-step 0"),
    (dict(checkpoint_interval=0), "--checkpoint-interval 0"),
    (dict(eval_interval=-1, eval_data="x"), "--eval-interval -1"),
    (dict(warmup_samples=0), "--warmup-samples 0"),
    (dict(seed=-1), "--seed -1"),
    (dict(seed=2**32), "--seed 4294967296: must be below"),
    (dict(eval_interval=5), "--eval-interval 5: needs --eval-data"),
    (dict(max_length=513), "--max-length 513: must be at most the 512 positions"),
    (dict(temperature=0.0), "--temperature 0.0: must be a finite number above 0; for greedy"),
    (dict(temperature=math.inf), "--temperature inf"),
    (dict(lr=0.0), "--lr 0.0"),
    (dict(lr=math.nan), "--lr nan"),
    (dict(eps=0.0), "--eps 0.0"),
    (dict(max_norm=-1.0), "--max-norm -1.0"),
    (dict(kl_weight=-0.1), "--kl-weight -0.1"),
    (dict(alpha=-0.1), "--alpha -0.1"),
    (dict(top_p=0.0), "--top-p 0.0"),
    (dict(top_p=1.1), "--top-p 1.1"),
    (dict(clip_eps=1.0), "--clip-eps 1.0"),
    (dict(w_min=3.0), "--w-min 3.0: must not be above --w-max 2.0"),
    (dict(data="nowhere.jsonl"), "--data nowhere.jsonl: cannot be read"),
    (dict(eval_data="nowhere.jsonl"), "--eval-data nowhere.jsonl: cannot be read"),
    (dict(rollouts_per_step=17, train_batch_size=4), "16 problems, but --rollouts-per-step is 17"),
    (dict(max_length=30), "line 1: the prompt has 39 tokens, which leaves no room within --max-length 30"),
    (dict(model_name="./nowhere"), "--model-name ./nowhere: no such folder.*--model-name embedded"),
    (dict(device="cuda"), "--device cuda: PyTorch finds no such device"),
]


BAD_IDS = [" ".join(f"{k}={v}" for k, v in change.items()) for change, _ in BAD]


@pytest.mark.parametrize(("change", "message"), BAD, ids=BAD_IDS)
def test_bad_input_is_refused_with_value_rule_and_way_out(tiny, change, message):
    if change.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(InputError, match=message):
        train.main(**tiny | change)
    assert not Path(tiny["output"]).exists()  # refused before a folder is created


def test_an_output_folder_that_cannot_be_written_is_refused(tiny, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(InputError, match=r"--output .*file: .*cannot be written.*--output"):
        train.main(**tiny | dict(output=str(tmp_path / "file")))


def test_two_runs_that_start_at_the_same_time_get_separate_folders(tmp_path):
    folder = choose_folder(str(tmp_path), "run")
    assert choose_folder(str(tmp_path), "run") == folder
    first = RunLog(folder, False, {})
    with pytest.raises(InputError, match="another run has just taken"):
        RunLog(folder, False, {})
    assert first.folder == folder
    assert RunLog(folder, True, {}).folder != folder


def test_a_run_without_git_works_and_records_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    run = RunLog(tmp_path / "run", False, {})
    assert json.loads((run.folder / "config.json").read_text())["git_commit"] is None


def test_metrics_are_valid_json_even_if_a_value_is_not_finite(tmp_path):
    run = RunLog(tmp_path / "run", False, {})
    run.metrics(0, {"a": math.nan, "b": math.inf, "c": 1.5})
    assert (run.folder / "metrics.jsonl").read_text() == '{"step": 0, "a": null, "b": null, "c": 1.5}\n'


def test_a_linear_schedule_falls_from_lr_to_zero(tiny):
    run = train.main(**tiny | dict(lr=1e-4, lr_schedule="linear", max_steps=4))
    assert [row["optim/lr"] for row in metrics_of(run)] == pytest.approx([1e-4, 0.75e-4, 0.5e-4, 0.25e-4])


def test_a_run_reports_if_it_takes_fewer_steps_than_requested(tiny, capsys):
    train.main(**tiny | dict(epochs=1, max_steps=100, rollouts_per_step=16, max_new_tokens=2))
    out = capsys.readouterr().out
    assert "training for 1 steps" in out and "fewer than --max-steps 100" in out


def test_failed_scores_do_not_count_for_the_bounds(tiny, reward_model_folder, monkeypatch, capsys):
    real = train.AceRewardModel.score_texts

    def half_fails(self, prompts, responses):
        scores = real(self, prompts, responses) - 50.0
        scores[::2] = torch.nan
        return scores

    monkeypatch.setattr(train.AceRewardModel, "score_texts", half_fails)
    train.main(**tiny | dict(reward_model_name=str(reward_model_folder), max_steps=1))
    assert float(re.search(r"max=(-?[\d.]+)", capsys.readouterr().out)[1]) < -1


def test_a_chat_template_that_refuses_a_system_message_raises_an_input_error(
    tiny, policy_folder, tokenizer, tmp_path
):
    folder = tmp_path / "strict"
    shutil.copytree(policy_folder, folder)
    (folder / "chat_template.jinja").write_text(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + tokenizer.chat_template
    )
    with pytest.raises(InputError, match=r"no system role.*leave --system-prompt out"):
        train.main(**tiny | dict(model_name=str(folder), system_prompt="Be brief."))
    train.main(**tiny | dict(model_name=str(folder), max_steps=1))


def test_a_run_is_never_overwritten(tiny):
    train.main(**tiny | dict(max_steps=1))
    with pytest.raises(InputError, match="already holds a run"):
        train.main(**tiny)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "it contains no problems"),
        ("\n\n", "it contains no problems"),
        ('{"question": "a", "answer": "1"}\nnot json\n', "line 2: not JSON"),
        ('{"question": "a", "answer": "1"}\n\n{"question": "b"}\n', "line 3: no 'answer'"),
        ('{"answer": "1"}\n', "line 1: no 'question'"),
        ('{"question": " ", "answer": "1"}\n', "line 1: no 'question'"),
        ('{"question": "a", "answer": null}\n', "line 1: no 'answer'"),
        ('{"question": "a", "answer": "thinking ####"}\n', "line 1: nothing follows the ####"),
        ('["question", "answer"]\n', "line 1: no 'question'"),
        ('{"question": "a", "answer": ' + "9" * 5000 + "}\n", "line 1: not JSON"),
        ("[" * 100_000, "line 1: not JSON"),
    ],
)
def test_bad_data_is_refused_with_file_and_line(tmp_path, content, message):
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=message) as refused:
        read_problems(str(path), "--data")
    assert str(path) in str(refused.value)


def test_answers_can_be_numbers_or_gsm8k_solutions(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(
        '{"question": "a", "answer": 8}\n{"question": "b", "answer": "3 + 4 = 7\\n#### 7", "more": 1}\n'
    )
    problems = read_problems(str(path), "--data")
    assert [(p.question, p.answer) for p in problems] == [("a", "8"), ("b", "7")]


def test_data_may_have_a_byte_order_mark_and_unicode_line_separators_inside_strings(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(
        '\ufeff{"question": "a\u2028b\x85c", "answer": "1"}\r\n{"question": "d", "answer": "2"}\r\n'.encode()
    )
    assert [p.question for p in read_problems(str(path), "--data")] == ["a\u2028b\x85c", "d"]


def test_data_sets_of_the_hub_load_through_datasets(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"question": "a", "answer": "#### 8"}\n')
    (tmp_path / "test.jsonl").write_text('{"question": "b", "answer": "#### 9"}\n')
    assert [p.answer for p in read_problems(f"hf:{tmp_path}", "--data")] == ["8"]
    assert [p.answer for p in read_problems(f"hf:{tmp_path}:default:test", "--data")] == ["9"]
    for bad in ("hf:", "hf:a:b:c:d"):
        with pytest.raises(InputError, match=r"hf:NAME\[:CONFIG\[:SPLIT\]\]"):
            read_problems(bad, "--data")
    with pytest.raises(InputError, match="could not be loaded"):
        read_problems(f"hf:{tmp_path}/nothing", "--data")


def test_the_main_configuration_is_used_if_a_hub_data_set_has_several(monkeypatch):
    import datasets

    calls = []

    def load_dataset(name, config, split):
        calls.append((name, config, split))
        if config is None:
            raise ValueError("Config name is missing. Please pick one among ['main', 'socratic']")
        return [{"question": "a", "answer": "#### 8"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_problems("hf:openai/gsm8k", "--data")[0].answer == "8"
    assert calls == [("openai/gsm8k", None, "train"), ("openai/gsm8k", "main", "train")]


# ---------------------------------------------------------------------------- the data, the documentation


def test_the_arithmetic_files_equal_what_their_script_writes(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "data"))
    import make_arithmetic

    monkeypatch.setattr(make_arithmetic, "HERE", tmp_path)
    make_arithmetic.main()
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (ROOT / "data" / path.name).read_bytes(), path.name
    assert len(list(tmp_path.iterdir())) == 4
    sys.modules.pop("make_arithmetic")


@pytest.mark.parametrize("name", ["arithmetic", "arithmetic_hard"])
def test_no_held_out_expression_is_trained_on_in_any_wording_and_all_answers_are_right(name):
    def expressions(part):
        problems = read_problems(str(ROOT / f"data/{name}_{part}.jsonl"), "--data")
        found = [re.search(r"\d[\d +*-]*\d|\d", p.question)[0] for p in problems]
        for expression, problem in zip(found, problems, strict=True):
            assert re.fullmatch(r"\d+( [-+*] \d+)+", expression)
            # eval is safe here: the line above allows only digits and operators.
            assert eval(expression) == int(problem.answer)
        return problems, set(found)

    (train_problems, trained), (test_problems, held_out) = expressions("train"), expressions("test")
    assert (len(train_problems), len(test_problems)) == (2000, 200)
    assert not trained & held_out
    if name == "arithmetic":  # nor in the opposite order
        assert not trained & {" + ".join(reversed(e.split(" + "))) for e in held_out}
    assert len({p.question for p in train_problems + test_problems}) == 2200


def test_every_hyperparameter_has_help_and_every_metric_is_documented(tiny):
    docs = train.main.__doc__
    for name in inspect.signature(train.main).parameters:
        assert re.search(rf"^ +{name}: ", docs, re.MULTILINE), name
    run = train.main(**tiny | dict(max_steps=1, eval_data=tiny["data"]))
    for name in {key for row in metrics_of(run) for key in row} - {"step"}:
        assert name in meanings(), f"docs/metrics.md does not explain {name}"
