"""What a run moves to host memory, against the same run that keeps everything on its device.

Both are on a CPU here, so "moving" means copying to other memory and back.
"""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load

import train
from src import models, placement
from src.engine import architecture, static_decoder
from src.engine.master_weights import MasterWeights
from src.engine.offload import Offloaded, find_blocks
from src.reward_model import AceRewardModel, layers_of
from tests.conftest import make_policy, make_reward_model

CPU = torch.device("cpu")
# Where the reward model is, and what else the plan says
SAVINGS = {
    "nothing": ("device", dict(moves={})),
    "whole": ("offload", dict(moves=dict.fromkeys(["trained weights", "Adam", "reference"], "visits"))),
    "pieces": (
        "stream",
        dict(
            moves={"trained weights": "visits", "Adam": "streams"},
            gradient_checkpointing=True,
            frees_cache=True,
        ),
    ),
}


def test_tensors_are_elsewhere_during_a_visit_and_back_home_after_it():
    tensors = [torch.randn(5), torch.randn(3, 4).bfloat16()]
    expected = [tensor.clone() for tensor in tensors]
    offloaded = Offloaded(lambda: tensors, CPU, change=True)
    homes = [tensor.data_ptr() for tensor in tensors]
    for _ in range(3):
        with offloaded.on_device():
            assert not {tensor.data_ptr() for tensor in tensors} & set(homes)
            for tensor, value in zip(tensors, expected, strict=True):
                assert torch.equal(tensor, value)
                value += 1
                tensor += 1
        assert [tensor.data_ptr() for tensor in tensors] == homes
        assert all(map(torch.equal, tensors, expected))


def test_tensors_that_should_not_change_are_not_copied_back():
    tensor = torch.zeros(3)
    with Offloaded(lambda: [tensor], CPU).on_device():
        tensor += 1
    assert tensor.tolist() == [0, 0, 0]


def test_tied_and_adjacent_weights_stay_so():
    joined = torch.randn(10, 4)
    first, second = joined.split([3, 7])
    tied = first.view(12)
    alone = torch.randn(2)
    tensors = [second, alone, tied, first, first]
    assert sorted(len(block.tensors) for block in find_blocks(tensors)) == [1, 3]
    with Offloaded(lambda: tensors, CPU, change=True).on_device():
        assert second.data_ptr() == first.data_ptr() + first.nbytes
        tied += 1
        assert torch.equal(first.flatten(), tied)
    assert torch.equal(first.flatten(), tied) and second.data_ptr() == first.data_ptr() + first.nbytes


def test_two_tensors_of_a_file_move_without_what_lies_between_them():
    file = torch.arange(100.0)
    tensors = [file[10:20], file[50:60]]
    Offloaded(lambda: tensors, CPU)
    assert [tensor.untyped_storage().nbytes() for tensor in tensors] == [40, 40]
    assert tensors[1].tolist() == list(range(50, 60))


def test_tensors_that_appear_during_a_visit_move_too():
    tensors = [torch.zeros(2)]
    offloaded = Offloaded(lambda: tensors, CPU, change=True)
    with offloaded.on_device():
        tensors.append(torch.ones(3))
        address = tensors[1].data_ptr()
    assert tensors[1].data_ptr() != address and tensors[1].tolist() == [1, 1, 1]
    with offloaded.on_device():
        tensors[1] += 1
    assert tensors[1].tolist() == [2, 2, 2]


def test_a_visit_that_runs_out_of_memory_leaves_every_tensor_at_home(monkeypatch):
    tensors = [torch.zeros(2), torch.ones(3)]
    offloaded = Offloaded(lambda: tensors, CPU, change=True)
    homes = [tensor.data_ptr() for tensor in tensors]
    real, calls = torch.empty_like, []

    def empty_like(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "empty_like", empty_like)
    with pytest.raises(torch.OutOfMemoryError), offloaded.on_device():
        pytest.fail("the second tensor has no room")
    assert [tensor.data_ptr() for tensor in tensors] == homes
    assert [tensor.tolist() for tensor in tensors] == [[0, 0], [1, 1, 1]]


def test_memory_of_a_gpu_is_copied_from_pinned_memory_and_back():
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    tensors = [torch.randn(1000, device="cuda"), torch.randn(10, device="cuda").bfloat16()]
    expected = [tensor.cpu() for tensor in tensors]
    offloaded = Offloaded(lambda: tensors, torch.device("cuda"), change=True)
    assert all(tensor.device.type == "cpu" and tensor.is_pinned() for tensor in tensors)
    with offloaded.on_device():
        assert {tensor.device.type for tensor in tensors} == {"cuda"}
        tensors[0] += 1
    assert torch.equal(tensors[0], expected[0] + 1) and torch.equal(tensors[1], expected[1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_saving_gives_the_same_bits_over_20_steps_with_a_resume(
    tiny, reward_model_folder, monkeypatch, dtype
):
    """Everything that a run writes: trained weights, moments, metrics and completions."""
    whole_plan, results, freed = placement.plan, {}, []
    monkeypatch.setattr(static_decoder, "release", lambda: freed.append(1))
    for name, (place, savings) in SAVINGS.items():

        def plan(*args, place=place, savings=savings):
            choice, memory = whole_plan(*args)
            return replace(choice, placement=place), replace(memory, **savings)

        monkeypatch.setattr(placement, "plan", plan)
        settings = dict(reward_model_name=str(reward_model_folder), reward_mode="rm", dtype=dtype, lr=1e-3)
        run = train.main(**tiny | settings | dict(run_name=name, epochs=100, max_steps=12))
        train.main(resume=str(run), max_steps=20)
        results[name] = {
            path.name: path.read_bytes()
            for path in (run / "step_20/training_state").glob("*.safetensors")
            if path.stem != "randomness"
        }
        results[name]["rollouts"] = (run / "rollouts.jsonl").read_bytes()
        assert len(freed) == (20 if savings.get("frees_cache") else 0)
    moments = load(results["nothing"]["exp_avg.safetensors"])
    assert all(moment.abs().max() > 0 for moment in moments.values())
    assert results["whole"] == results["nothing"]
    assert results["pieces"] == results["nothing"]


@pytest.mark.parametrize("way", ["visits", "streams"])
def test_moments_and_trained_weights_are_at_home_between_updates(way):
    policy = make_policy()
    moves = {"Adam": way, "trained weights": "visits"}
    master = MasterWeights(policy, torch.bfloat16, moves)
    optimizer = torch.optim.AdamW(master.parameters, lr=1e-3, fused=True)
    homes: dict[int, set[int]] = {}
    for step in range(3):
        with master.on_device(optimizer):
            for p in master.parameters:
                p.grad = torch.ones_like(p)
            master.step(optimizer)
            master.zero_grad()
        moments = [m for state in optimizer.state.values() for m in state.values()]
        assert len(moments) == 3 * len(master.parameters)
        homes[step] = {tensor.data_ptr() for tensor in (*moments, *master.parameters)}
    assert homes[0] == homes[1] == homes[2]


def test_an_offloaded_reference_computes_the_same_and_its_weights_stay_joined():
    policy = make_policy()
    MasterWeights(policy, torch.bfloat16)
    ids = torch.arange(10)[None]
    with models.make_reference(policy, None).model() as model, torch.no_grad():
        expected = model(ids).logits
    reference = models.make_reference(policy, None, offload=True)
    with reference.model() as model, torch.no_grad():
        assert torch.equal(model(ids).logits, expected)
        attention = model.model.layers[0].self_attn
        assert attention.k_proj.weight.data_ptr() == (
            attention.q_proj.weight.data_ptr() + attention.q_proj.weight.nbytes
        )
    assert architecture.is_llama_like(policy)


def test_a_streamed_reward_model_has_only_one_layer_on_the_device(reward_model_folder):
    plain = AceRewardModel(str(reward_model_folder), dtype=torch.float32)
    streamed = AceRewardModel(str(reward_model_folder), dtype=torch.float32, offload=True, stream=True)
    texts = ["2", "The answer is 7.", "x" * 50]
    layers = streamed.model.model.layers
    homes = [layer.mlp.up_proj.weight.data_ptr() for layer in layers]
    seen = []

    def note(*_):
        seen.append(
            [layer.mlp.up_proj.weight.data_ptr() != home for layer, home in zip(layers, homes, strict=True)]
        )

    for layer in layers:
        layer.mlp.register_forward_pre_hook(note)
    torch.testing.assert_close(
        streamed.score_texts("q", texts), plain.score_texts("q", texts), atol=1e-6, rtol=0
    )
    assert seen == [[True, False], [False, True]]
    assert [layer.mlp.up_proj.weight.data_ptr() for layer in layers] == homes


def test_a_layer_that_fails_goes_home_too(reward_model_folder, monkeypatch, capsys):
    streamed = AceRewardModel(str(reward_model_folder), dtype=torch.float32, offload=True, stream=True)
    layer = streamed.model.model.layers[1]
    home = layer.mlp.up_proj.weight.data_ptr()

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    handle = layer.mlp.register_forward_pre_hook(fail)
    assert streamed.score_texts("q", ["1"]).isnan().all()
    assert "neutral score" in capsys.readouterr().out
    assert layer.mlp.up_proj.weight.data_ptr() == home
    handle.remove()
    assert streamed.score_texts("q", ["1"]).isfinite().all()


def test_the_layers_of_a_model_are_its_largest_list():
    model = make_reward_model()
    assert layers_of(model) == list(model.model.layers)
    assert layers_of(torch.nn.Linear(2, 2)) == []
