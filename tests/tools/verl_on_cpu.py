"""What verl 0.9.1 lacks to train on a CPU: a platform, and a rollout that samples with transformers.

Used by one slow test of real training steps. VERL_USE_EXTERNAL_MODULES makes verl load this module in each of
its processes. verl does not support this setup. It shows that the parts fit together, and nothing more.
"""

import abc
import contextlib
import types

import ray
import torch
from transformers import AutoModelForCausalLM
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import set_platform
from verl.utils import import_utils
from verl.workers.rollout import base, replica


class NoDevice(types.ModuleType):
    """torch.cpu, plus stubs for what only an accelerator has: memory statistics, caches and streams."""

    def mem_get_info(self, *_):
        return 1, 1

    def get_device_name(self, *_):
        return "cpu"

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(torch.cpu, name, lambda *_, **__: 0)


def always(value=None):
    """A method that ignores its arguments and returns a fixed value."""
    return lambda *_, **__: value


class PlatformCPU(PlatformBase):
    device_name, vendor_name, device_module = "cpu", "cpu", NoDevice("cpu")
    is_available = always(True)
    current_device = always("cpu")
    device_count = always(1)
    get_device_capability = always((None, None))
    communication_backend_name = always("gloo")
    visible_devices_envvar = always("CUDA_VISIBLE_DEVICES")
    ray_resource_name = always("GPU")  # Ray is told of a GPU that does not exist
    ray_noset_envvars = always(["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"])
    is_ipc_supported = always(False)
    nvtx_range = always(contextlib.nullcontext())


for name in PlatformBase.__abstractmethods__ - vars(PlatformCPU).keys():
    setattr(PlatformCPU, name, always())
set_platform(abc.update_abstractmethods(PlatformCPU)())
import_utils.is_trl_available = lambda: False  # verl needs a class that the tests' TRL no longer has

# verl asks for the backend "cpu:gloo,cpu:gloo", which torch rejects.
init_process_group = torch.distributed.init_process_group
torch.distributed.init_process_group = lambda backend=None, **options: init_process_group("gloo", **options)


@ray.remote(num_cpus=0)
class Server:
    """A copy of the policy that samples, one completion at a time."""

    def __init__(self, path: str, response_length: int):
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.response_length, self.step = response_length, 0

    def load(self, weights: dict[str, torch.Tensor], step: int | None) -> None:
        self.model.load_state_dict({name: weight.float() for name, weight in weights.items()}, strict=False)
        self.step = step or 0

    @torch.no_grad()
    def generate(self, prompt_ids, sampling_params, **_):
        logits, past, ids, log_probs = None, None, [], []
        feed = torch.tensor([list(prompt_ids)])
        for _ in range(self.response_length):
            out = self.model(feed, past_key_values=past, use_cache=True)
            past, logits = out.past_key_values, out.logits[0, -1] / max(sampling_params["temperature"], 1e-6)
            all_log_probs = logits.log_softmax(-1)
            token = torch.multinomial(all_log_probs.exp(), 1)
            ids.append(token.item())
            log_probs.append(all_log_probs[token].item())
            if ids[-1] == self.model.config.eos_token_id:
                break
            feed = token[None]
        return replica.TokenOutput(
            token_ids=ids,
            log_probs=log_probs,
            stop_reason="completed",
            num_preempted=0,
            extra_fields={"global_steps": self.step},
        )

    def no_op(self, *_, **__) -> None:
        return None

    wake_up = sleep = abort_all_requests = resume_generation = no_op
    clear_kv_cache = release_kv_cache = resume_kv_cache = no_op


class Replica(replica.RolloutReplica):
    """verl's handle on a server."""

    async def launch_servers(self):
        path, length = self.model_config.path, self.config.response_length
        self._server_handle = Server.options(name=f"cpu_server_{self.replica_rank}").remote(path, length)
        self._server_address, self.servers = f"cpu:{self.replica_rank}", [self._server_handle]


class Rollout(base.BaseRollout):
    """The training process's side of the rollout: sends the weights to the server."""

    async def resume(self, tags):
        return None

    async def release(self):
        return None

    async def update_weights(self, weights, global_steps=None, **_):
        state = {name: weight.detach().cpu().clone() for name, weight in weights}
        await ray.get_actor("cpu_server_0").load.remote(state, global_steps)


base._ROLLOUT_REGISTRY["cpu", "async"] = "tests.tools.verl_on_cpu.Rollout"
replica.RolloutReplicaRegistry.register("cpu", lambda: Replica)
