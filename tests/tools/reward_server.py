"""A reward-model server for tests: AceRewardModel behind the API of vLLM or SGLang, with faults on demand."""

import asyncio
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from aiohttp import web

from src.reward_model import AceRewardModel


class RewardServer:
    """Answers POST /classify.

    Attributes:
        faults: Faults of the next requests, one each: "drop", "slow", "nonsense", or an HTTP status such as
            "500". "forever X" repeats the fault X.
        ignores_use_activation: Apply a sigmoid to every score, like an old vLLM that does not know the flag.
        requests: The bodies received so far.
    """

    def __init__(self, reward_model: AceRewardModel):
        self.reward_model = reward_model
        self.faults: list[str] = []
        self.ignores_use_activation = False
        self.requests: list[dict] = []
        self.address = ""

    async def classify(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.requests.append(body)
        fault = self.faults[0] if self.faults else ""
        if fault.startswith("forever "):
            fault = fault.removeprefix("forever ")
        elif fault:
            self.faults.pop(0)
        if fault == "drop":
            request.transport.close()
        elif fault == "slow":
            await asyncio.sleep(1.0)
        elif fault == "nonsense":
            result = {"index": 0, "label": "LABEL_0", "probs": ["high"]}
            return web.json_response({"data": [result], "embedding": [math.nan]})
        elif fault:
            return web.Response(status=int(fault))
        if "input" in body:  # from a client of vLLM
            (score,) = self.reward_model._forward([tuple(body["input"])]).tolist()
            if body.get("use_activation", True) or self.ignores_use_activation:
                score = 1 / (1 + math.exp(-score))
            result = {"index": 0, "label": "LABEL_0", "probs": [score], "num_classes": 1}
            return web.json_response({"object": "list", "data": [result]})
        (score,) = self.reward_model._forward([tuple(body["input_ids"])]).tolist()
        meta_info = {"prompt_tokens": len(body["input_ids"])}
        return web.json_response({"embedding": [score], "meta_info": meta_info})


@contextmanager
def serving(reward_model: AceRewardModel) -> Iterator[RewardServer]:
    """Run a server in its own thread for the duration of a with block."""
    server, loop, started = RewardServer(reward_model), asyncio.new_event_loop(), threading.Event()
    app = web.Application()
    app.router.add_post("/classify", server.classify)
    runner = web.AppRunner(app, shutdown_timeout=0.1)

    async def start() -> None:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server.address = f"127.0.0.1:{runner.addresses[0][1]}"
        started.set()

    def run() -> None:
        loop.run_until_complete(start())
        loop.run_forever()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert started.wait(30)
    yield server
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(30)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(30)
    loop.close()
