"""The bundled reward model: a judge of final answers.

It is SmolLM2-135M-Instruct with a LoRA adapter (data/embedded_judge/, made by data/make_judge.py) that was
trained to answer arithmetic questions directly, without any reasoning. It scores a solution by the
log-probability of the solution's final answer. Near misses share digits with the truth, so they score above
wild guesses.

A policy could game it only by naming an answer that the judge wrongly believes in. The judge reads nothing
but the final answer, so length, layout, confident words and pleas have no effect. A solution without a final
answer gets the lowest possible score.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from src.answers.comparison import repeats_question
from src.answers.final_answer import final_answer
from src.answers.numerals import read_number
from src.answers.text import strip_markup
from src.hub import embedded_folder
from src.models import merge_adapter

JUDGE_FOLDER = Path(__file__).parent.parent / "data" / "embedded_judge"
NO_ANSWER = -30.0  # nats, the lowest score. Near misses get -5 to -15, wild guesses (unclamped) -20 to -60


class JudgeText(NamedTuple):
    """A question and an answer as the judge reads them."""

    ids: tuple[int, ...]  # token ids
    start: int  # index in `ids` at which the answer starts


def load_judge(dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the judge with its adapter merged, and its tokenizer, onto the CPU."""
    folder = embedded_folder()
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = merge_adapter(base, JUDGE_FOLDER)
    return model.to(dtype), AutoTokenizer.from_pretrained(folder)


def plain_answer(question: str, response: str) -> str | None:
    """The final answer of a response as the judge reads it: a number in digits, or text.

    Text is truncated to 40 characters. The answer is None if the response has no final answer or several.

    >>> plain_answer("What is 500 + 500?", "I think so. The answer is $1,000.00.")
    '1000'
    """
    values = final_answer(response, "flexible", question).values  # usually cached by the verifier
    if len(values) != 1 or repeats_question(values[0], "", question):  # as for the verifier, not an answer
        return None
    number = read_number(values[0])
    if number is None:
        return strip_markup(values[0])[:40] or None
    value = number.value
    if value.denominator != 1:
        return f"{float(value):.10g}" if value.denominator < 10**9 else None
    return str(value.numerator) if abs(value) < 10**15 else None


def judge_text(tokenizer: PreTrainedTokenizerBase, question: str, answer: str) -> JudgeText:
    """Tokenize a question and an answer from `plain_answer`."""
    before = tokenizer.encode(f"Question: {question.strip()}\nAnswer:", add_special_tokens=False)
    after = tokenizer.encode(f" {answer}", add_special_tokens=False)
    return JudgeText((*before, *after, tokenizer.eos_token_id), len(before))


def answer_log_probs(model: PreTrainedModel, texts: list[JudgeText]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the log-probs of the answer tokens of each text.

    Args:
        model: A causal language model. Its output head is applied only to the answer tokens.
        texts: n texts, from `judge_text`.

    Returns:
        The sums (n,) float32, nats, differentiable, and the number of answer tokens (n,) int64.
    """
    longest = max(len(text.ids) for text in texts)
    position = torch.arange(longest)
    lengths = torch.tensor([[len(text.ids)] for text in texts])
    starts = torch.tensor([[text.start] for text in texts])
    mask = (position < lengths).to(model.device)  # (n, S)
    answer = mask & (position >= starts).to(model.device)  # (n, S)
    padded = [[*text.ids, *[0] * (longest - len(text.ids))] for text in texts]
    ids = torch.tensor(padded, device=model.device)  # (n, S)
    output = model.base_model(input_ids=ids, attention_mask=mask.long(), use_cache=False)
    hidden = output.last_hidden_state  # (n, S, D)
    logits = model.get_output_embeddings()(hidden[:, :-1][answer[:, 1:]]).float()  # (N, V), N answer tokens
    log_probs = logits.log_softmax(-1).gather(1, ids[answer][:, None])[:, 0]  # (N,)
    sums = torch.zeros(len(texts), device=model.device).index_add(0, answer.nonzero()[:, 0], log_probs)
    return sums, answer.sum(dim=1)
