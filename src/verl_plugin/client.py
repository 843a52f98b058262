"""HTTP client for a reward model served by vLLM or SGLang: gets raw scores from /classify, with retries."""

import asyncio
import functools
import math
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import aiohttp
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from src.errors import InputError
from src.hub import resolve
from src.reward_model import encode_conversation, system_prompt_for

SIGMOID = (
    "all between 0 and 1, as if the server had applied a sigmoid; serve raw scores (with a vLLM that "
    "supports use_activation, or with its --pooler-config), or set rm_unit_scores=True if the model's own "
    "scores lie in that range"
)
REQUESTS_AT_ONCE = 8


@dataclass(frozen=True)
class Server:
    """A server that scores solutions with a reward model."""

    address: str  # host:port, or a URL that starts with http:// or https://
    api: str  # "vllm" or "sglang", whose /classify endpoints differ
    model: str  # its name on the server, which is also used to load its tokenizer
    max_length: int = 4096  # tokens per conversation
    timeout_s: float = 30.0  # seconds to wait for one reply
    deadline_s: float = 120.0  # seconds for all attempts to get one score


class ServerReply(NamedTuple):
    score: float  # raw; nan if every attempt failed
    retries: int
    reason: str  # why the last attempt failed; empty if it succeeded


@functools.cache
def load_reward_tokenizer(rm_model: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(resolve(rm_model, "--rm-model"))


async def reward_model_score(
    tokenizer: PreTrainedTokenizerBase, question: str, response: str, server: Server
) -> ServerReply:
    """Ask a server for the raw score of one solution, retrying until the deadline.

    The conversation is sent as the same token ids that AceRewardModel uses, so no server can add or strip a
    token. A client error (4xx except 408 and 429) is final. Any other failure may be temporary and is
    retried.
    """
    system_prompt = system_prompt_for(server.model)
    ids, _ = encode_conversation(tokenizer, system_prompt, question, response, server.max_length)
    body: dict[str, Any] = {"model": server.model}
    if server.api == "vllm":
        body |= {"input": list(ids), "use_activation": False}  # vLLM applies a sigmoid by default
    else:
        body |= {"input_ids": list(ids)}
    url = ("" if "://" in server.address else "http://") + f"{server.address}/classify"
    deadline = time.monotonic() + server.deadline_s
    retries = 0
    while True:
        final = False
        timeout = aiohttp.ClientTimeout(total=max(min(server.timeout_s, deadline - time.monotonic()), 0.01))
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.post(url, json=body) as reply,
            ):
                reply.raise_for_status()
                return ServerReply(read_score(server.api, await reply.json()), retries, "")
        except aiohttp.ClientResponseError as error:
            reason = f"{url} answered {error.status} {error.message}"
            final = 400 <= error.status < 500 and error.status not in (408, 429)
        except asyncio.TimeoutError:
            reason = f"{url} did not answer within {timeout.total:.3g} s"
        except (aiohttp.ClientError, ValueError) as error:
            reason = f"{url}: {type(error).__name__}: {error}"
        pause = min(0.25 * 2**retries, 8.0)
        if final or time.monotonic() + pause >= deadline:
            return ServerReply(math.nan, retries, reason)
        retries += 1
        await asyncio.sleep(pause)


def read_score(api: str, body: Any) -> float:
    """Read the score from the JSON body of a server's reply.

    Raises:
        ValueError: The body does not hold exactly one finite score.

    >>> read_score("vllm", {"data": [{"index": 0, "label": "LABEL_0", "probs": [-1.5], "num_classes": 1}]})
    -1.5
    >>> read_score("sglang", {"embedding": [-1.5], "meta_info": {}})
    -1.5
    """
    try:
        values = body["data"][0]["probs"] if api == "vllm" else body["embedding"]
        (value,) = values
    except (KeyError, IndexError, TypeError, ValueError):
        raise ValueError(f"not the single score of a one-label classifier: {str(body)[:200]}") from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"the score {value!r} is not a finite number")
    return float(value)


def look_like_probabilities(scores: list[float]) -> bool:
    """Whether a server seems to have applied a sigmoid: at least four scores, all of them between 0 and 1."""
    return len(scores) >= 4 and all(0.0 <= score <= 1.0 for score in scores)


def score_all(pairs: list[tuple[str, str]], server: Server) -> list[float]:
    """Raw scores of (question, response) pairs, requested at most eight at a time.

    Raises:
        InputError: The server did not return a score for every pair.
    """
    tokenizer = load_reward_tokenizer(server.model)

    async def ask_all() -> list[ServerReply]:
        slots = asyncio.Semaphore(REQUESTS_AT_ONCE)

        async def ask(pair: tuple[str, str]) -> ServerReply:
            async with slots:
                return await reward_model_score(tokenizer, *pair, server)

        return await asyncio.gather(*map(ask, pairs))

    replies = asyncio.run(ask_all())
    for reply in replies:
        if math.isnan(reply.score):
            raise InputError(
                f"rm_address {server.address}: no score after {reply.retries} retries: {reply.reason}"
            )
    return [reply.score for reply in replies]


def check_reward_model(server: Server, unit_scores: bool) -> None:
    """Ask a server for the scores of four very different responses, before a run relies on it.

    Args:
        unit_scores: Whether the model's own scores lie between 0 and 1, so that such scores are accepted.

    Raises:
        InputError: The server does not return the scores, or returns probabilities.
    """
    question = "What is 5 + 3?"
    responses = ["5 + 3 = 8. The answer is \\boxed{8}.", "The answer is \\boxed{7}.", "", "Tuesday " * 40]
    scores = score_all([(question, response) for response in responses], server)
    if not unit_scores and look_like_probabilities(scores):
        raise InputError(f"rm_address {server.address}: its scores {scores} are {SIGMOID}")
