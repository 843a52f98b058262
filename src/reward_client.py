"""A reward model behind HTTP: the raw score of one solution from the /classify of vLLM or SGLang, with retries and a deadline."""

import asyncio
import functools
import math
import time
from typing import Any, NamedTuple

import aiohttp
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from src.errors import InputError
from src.models import resolve
from src.reward_model import encode_conversation, system_prompt_for

SIGMOID = (
    "all between 0 and 1, as if the server put them through a sigmoid; serve the raw score (a vLLM that knows use_activation, or "
    "its --pooler-config), or set rm_unit_scores=True if the model's own scores lie there"
)


@functools.cache
def load_tokenizer(rm_model: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(resolve(rm_model, "--rm-model"))


class RewardModelAnswer(NamedTuple):
    score: float  # raw; nan: there is none
    retries: int
    reason: str  # of the last failure


async def reward_model_score(
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    response: str,
    *,
    address: str,
    rm_api: str,
    rm_model: str,
    rm_max_length: int = 4096,
    rm_timeout_s: float = 30.0,
    rm_deadline_s: float = 120.0,
) -> RewardModelAnswer:
    """Ask a server for the raw score of one solution, again and again until the deadline.

    The conversation goes there as token ids, the very ones that AceRewardModel computes with: no server adds a token or
    strips one. Client errors (4xx but 408 and 429) are final, everything else may pass.

    Args:
        address: host:port, or a URL that begins with http:// or https://.
        rm_api: "vllm" or "sglang", the form of its /classify.
        rm_timeout_s, rm_deadline_s: Seconds for one answer, and for all attempts together.
    """
    system_prompt = system_prompt_for(rm_model)
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    ids = list(encode_conversation(tokenizer, system, question, response, rm_max_length)[0])
    # vLLM would put the score through a sigmoid if it were not told otherwise.
    body = {"model": rm_model} | ({"input": ids, "use_activation": False} if rm_api == "vllm" else {"input_ids": ids})
    url = ("" if "://" in address else "http://") + f"{address}/classify"
    deadline = time.monotonic() + rm_deadline_s
    retries = 0
    while True:
        final = False
        timeout = aiohttp.ClientTimeout(total=max(min(rm_timeout_s, deadline - time.monotonic()), 0.01))
        try:
            async with aiohttp.ClientSession(timeout=timeout) as session, session.post(url, json=body) as answer:
                answer.raise_for_status()
                return RewardModelAnswer(read_score(rm_api, await answer.json()), retries, "")
        except aiohttp.ClientResponseError as error:
            reason = f"{url} answered {error.status} {error.message}"
            final = 400 <= error.status < 500 and error.status not in (408, 429)
        except asyncio.TimeoutError:
            reason = f"{url} did not answer within {timeout.total:.3g} s"
        except (aiohttp.ClientError, ValueError) as error:
            reason = f"{url}: {type(error).__name__}: {error}"
        pause = min(0.25 * 2**retries, 8.0)
        if final or time.monotonic() + pause >= deadline:
            return RewardModelAnswer(math.nan, retries, reason)
        retries += 1
        await asyncio.sleep(pause)


def read_score(rm_api: str, answer: Any) -> float:
    """The score in the body of an answer.

    Raises:
        ValueError: It holds none.

    >>> read_score("vllm", {"data": [{"index": 0, "label": "LABEL_0", "probs": [-1.5], "num_classes": 1}]})
    -1.5
    >>> read_score("sglang", {"embedding": [-1.5], "meta_info": {}})
    -1.5
    """
    try:
        values = answer["data"][0]["probs"] if rm_api == "vllm" else answer["embedding"]
        (value,) = values
    except (KeyError, IndexError, TypeError, ValueError):
        raise ValueError(f"not the one score of a classifier with one label: {str(answer)[:200]}") from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a finite number")
    return float(value)


def like_probabilities(scores: list[float]) -> bool:
    """Whether scores look as if a server had put them through a sigmoid: several, and each of them from 0 to 1."""
    return len(scores) >= 4 and all(0.0 <= score <= 1.0 for score in scores)


def score_all(pairs: list[tuple[str, str]], settings: dict) -> list[float]:
    """Raw scores of (question, response) pairs, eight at a time.

    Raises:
        InputError: One could not be had.
    """
    tokenizer = load_tokenizer(settings["rm_model"])
    asked = {name: settings[name] for name in ("rm_api", "rm_model", "rm_max_length", "rm_timeout_s", "rm_deadline_s")}

    async def ask_all() -> list[RewardModelAnswer]:
        eight = asyncio.Semaphore(8)

        async def ask(pair: tuple[str, str]) -> RewardModelAnswer:
            async with eight:
                return await reward_model_score(tokenizer, *pair, address=settings["rm_address"], **asked)

        return await asyncio.gather(*map(ask, pairs))

    answers = asyncio.run(ask_all())
    for answer in answers:
        if math.isnan(answer.score):
            raise InputError(f"rm_address {settings['rm_address']}: no score after {answer.retries} retries: {answer.reason}")
    return [answer.score for answer in answers]


def check_reward_model(settings: dict, unit_scores: bool) -> None:
    """Ask a server for four scores that have little in common, before a run depends on it.

    Raises:
        InputError: It does not give them, or gives probabilities.
    """
    question = "What is 5 + 3?"
    responses = ["5 + 3 = 8. The answer is \\boxed{8}.", "The answer is \\boxed{7}.", "", "Tuesday " * 40]
    scores = score_all([(question, response) for response in responses], settings)
    if not unit_scores and like_probabilities(scores):
        raise InputError(f"rm_address {settings['rm_address']}: its scores {scores} are {SIGMOID}")
