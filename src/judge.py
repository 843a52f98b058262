"""The embedded reward model: a judge of final answers that comes with this repository.

It is SmolLM2-135M-Instruct with a LoRA adapter (data/embedded_judge/, made by data/make_judge.py) that has learnt to answer
arithmetic at once, without a word of reasoning. It scores a solution by the log-probability that it gives to the solution's
final answer: near misses share digits with the truth and score above wild guesses.

How a policy could game it: by naming an answer that the judge wrongly believes in. Nothing else of a solution is read, so
length, layout, confident words and pleas have no say; a solution without a final answer gets the lowest score there is.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from src.answer_numbers import read_number
from src.answer_text import unwrap
from src.answers import final_answer
from src.models import embedded_folder, merge_adapter

JUDGE_FOLDER = Path(__file__).parent.parent / "data" / "embedded_judge"
NO_ANSWER = -30.0  # nats; no answer scores lower. Near misses score -5 to -15, wild guesses -20 to -60


class JudgeText(NamedTuple):
    """A question and an answer as the judge reads them."""

    ids: tuple[int, ...]
    start: int  # of the answer in `ids`


def load_judge(dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The judge, its adapter merged in, and its tokenizer; on the CPU."""
    folder = embedded_folder()
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = merge_adapter(base, JUDGE_FOLDER)
    return model.to(dtype), AutoTokenizer.from_pretrained(folder)


def plain_answer(question: str, response: str) -> str | None:
    """The final answer of a response as the judge reads it: a number in digits, or at most 40 characters of text.

    >>> plain_answer("What is 500 + 500?", "I think so. The answer is $1,000.00.")
    '1000'
    """
    values = final_answer(response, "flexible", question).values
    if len(values) != 1:
        return None
    number = read_number(values[0])
    if number is None:
        return unwrap(values[0])[:40] or None
    value = number.value
    if value.denominator != 1:
        return f"{float(value):.10g}" if value.denominator < 10**9 else None
    return str(value.numerator) if abs(value) < 10**15 else None


def judge_text(tokenizer: PreTrainedTokenizerBase, question: str, answer: str) -> JudgeText:
    """Token ids of a question and a plain answer."""
    before = tokenizer.encode(f"Question: {question.strip()}\nAnswer:", add_special_tokens=False)
    after = tokenizer.encode(f" {answer}", add_special_tokens=False)
    return JudgeText((*before, *after, tokenizer.eos_token_id), len(before))


def answer_log_probs(model: PreTrainedModel, texts: list[JudgeText]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the log-probs of each text's answer tokens, (n,) float32, nats, and their number (n,); differentiable.

    Args:
        model: A causal language model.
        texts: n texts; the output head sees their answer tokens alone.
    """
    longest = max(len(text.ids) for text in texts)
    place = torch.arange(longest)
    lengths = torch.tensor([[len(text.ids)] for text in texts])
    mask = (place < lengths).to(model.device)  # (n, S)
    answer = ((place >= torch.tensor([[text.start] for text in texts])) & (place < lengths)).to(model.device)  # (n, S)
    ids = torch.tensor([[*text.ids, *[0] * (longest - len(text.ids))] for text in texts], device=model.device)  # (n, S)
    hidden = model.base_model(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state  # (n, S, D)
    logits = model.get_output_embeddings()(hidden[:, :-1][answer[:, 1:]]).float()  # (N, V), N answer tokens
    log_probs = logits.log_softmax(-1).gather(1, ids[answer][:, None])[:, 0]  # (N,)
    sums = torch.zeros(len(texts), device=model.device).index_add(0, answer.nonzero()[:, 0], log_probs)
    return sums, answer.sum(dim=1)
