"""Score solutions with a reward model: AceMath-7B-RM, another one-label classifier, or the bundled judge."""

import contextlib
import importlib.util
import math
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from src.console import detail, warn
from src.engine.memory import is_out_of_memory
from src.engine.offload import Offloaded
from src.errors import InputError, first_line
from src.hub import EMBEDDED, embedded_folder, resolve
from src.judge import NO_ANSWER, JudgeText, answer_log_probs, judge_text, load_judge, plain_answer
from src.models import PLAIN_OUTPUT, conversation, skeleton

# AceMath-7B-RM was trained with this system prompt (model card, "How to use").
ACEMATH_SYSTEM_PROMPT = "Please reason step by step, and check your final answer within \\boxed{}."
ACEMATH = "nvidia/AceMath-7B-RM"
BATCH_TOKENS = 8192
INT8_INSTALL = "pip install bitsandbytes==0.50.2"


class AceRewardModel:
    """A frozen reward model that scores solutions.

    Args:
        model_name: Hub name or local folder of a sequence classifier with one label, or "embedded" for the
            bundled judge (src/judge.py). The default's license is CC-BY-NC-4.0, which forbids commercial use.
        device, dtype: Where the model computes, and in which dtype.
        system_prompt: System message of each conversation; if None, there is no such message. The default is
            the one that AceMath was trained with. The bundled judge ignores it, and reads only the question
            and the final answer.
        max_length: Maximum number of tokens in the rendered conversation. A longer conversation loses the
            start of its response.
        batch_tokens: Maximum number of tokens in one forward pass, including padding. Lowered permanently if
            memory runs out.
        offload: Keep the weights in pinned host memory, and copy them to `device` only while scoring.
        stream: With `offload`, copy each layer only while it computes, once for every forward pass.
        load_in_8bit: Load linear layers in int8 (bitsandbytes), which takes half the memory of bfloat16.

    Attributes:
        failed: Number of responses so far that could not be scored.
        truncated: Number of responses so far that lost their start.

    Raises:
        InputError: The model cannot be found or loaded, or is not a reward model.
    """

    def __init__(
        self,
        model_name: str = ACEMATH,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        system_prompt: str | None = ACEMATH_SYSTEM_PROMPT,
        max_length: int = 4096,
        batch_tokens: int = BATCH_TOKENS,
        offload: bool = False,
        stream: bool = False,
        load_in_8bit: bool = False,
    ):
        assert not (offload and load_in_8bit)
        self.device = torch.device(device)
        self.batch_tokens = batch_tokens
        self.failed = 0
        self.truncated = 0
        self.judges = model_name == EMBEDDED
        if self.judges:
            self.model, self.tokenizer = load_judge(dtype)
        else:
            self.model, self.tokenizer = load_classifier(model_name, dtype, load_in_8bit)
        self.model.eval().requires_grad_(False)
        self.config = self.model.config.get_text_config()
        self.max_length = min(max_length, getattr(self.config, "max_position_embeddings", max_length))
        self.offloaded: Offloaded | None = None
        if offload:
            for buffer in self.model.buffers():  # rotary frequencies: a few kilobytes
                buffer.data = buffer.data.to(self.device)
            streamed = stream_layers(self.model, self.device) if stream else set()
            rest = [weight for weight in self.model.parameters() if weight not in streamed]
            self.offloaded = Offloaded(lambda: rest, self.device)
        else:
            # Because of how transformers wraps to(), mypy mistakes the device for the model.
            self.model.to(self.device)  # type: ignore[arg-type]
        self.system_prompt = system_prompt
        try:
            self.encode("question", "response")
        except Exception as error:  # a template made elsewhere can raise anything
            raise InputError(
                f"--reward-model-name {model_name}: its chat template rejects the conversation "
                f"({first_line(error)}); choose another reward model"
            ) from None

    def encode(self, prompt: str, response: str) -> tuple[int, ...]:
        """Token ids of one conversation, from `encode_conversation`. Counts truncated responses."""
        ids, truncated = encode_conversation(
            self.tokenizer, self.system_prompt, prompt, response, self.max_length
        )
        self.truncated += truncated
        return ids

    def compute_reward(self, prompt: str, response: str) -> float:
        """Raw score of one response; see `compute_batch_reward`."""
        return self.compute_batch_reward(prompt, [response])[0].item()

    def compute_batch_reward(self, prompt: str | list[str], responses: list[str]) -> torch.Tensor:
        """Raw scores of responses, which all answer one question or answer one question each.

        Args:
            prompt: The question, or one question per response.
            responses: B texts.

        Returns:
            (B,) float32 on the CPU. A response that cannot be scored (memory ran out, or the score is not
            finite) gets 0.0 and is counted in `self.failed`. Scoring never stops a run.
        """
        return self.score_texts(prompt, responses).nan_to_num(0.0)

    def score_texts(self, prompt: str | list[str], responses: list[str]) -> torch.Tensor:
        """Like `compute_batch_reward`, but a response that cannot be scored gets nan."""
        prompts = [prompt] * len(responses) if isinstance(prompt, str) else prompt
        pairs = list(zip(prompts, responses, strict=True))
        # Score each text only once, because rounding can make its score depend on the rest of its batch.
        read = {pair: self._read(*pair) for pair in dict.fromkeys(pairs)}
        score_of: dict = dict.fromkeys(read.values(), math.nan)
        score_of[None] = NO_ANSWER  # the text is None only if the judge finds no final answer
        # Texts are sorted by length, so that batches have little padding.
        texts = sorted((text for text in score_of if text is not None), key=_length)
        try:
            with self.offloaded.on_device() if self.offloaded else contextlib.nullcontext():
                while texts:
                    detail(f"{len(texts)} texts left")
                    fitting = self._fitting(texts)
                    batch, texts = texts[:fitting], texts[fitting:]
                    score_of |= zip(batch, self._scores(batch), strict=True)
        except RuntimeError as error:  # no room on the device for the weights themselves
            warn(
                f"the reward model could not be moved to {self.device} ({error}); "
                "all completions get a neutral score"
            )
        scores = torch.tensor([score_of[read[pair]] for pair in pairs])  # (B,)
        scores = torch.where(scores.isfinite(), scores, torch.nan)
        self.failed += int(scores.isnan().sum())
        return scores

    def _read(self, prompt: str, response: str) -> tuple[int, ...] | JudgeText | None:
        """The text that the model scores. None if the judge finds no final answer in the response."""
        if not self.judges:
            return self.encode(prompt, response)
        answer = plain_answer(prompt, response)
        return None if answer is None else judge_text(self.tokenizer, prompt, answer)

    def _fitting(self, texts: list) -> int:
        """How many of the texts, sorted by length, fit into `batch_tokens` with padding; at least one."""
        fitting = 1
        while fitting < len(texts) and (fitting + 1) * _length(texts[fitting]) <= self.batch_tokens:
            fitting += 1
        return fitting

    def _scores(self, texts: list) -> list[float]:
        """Scores of one batch, which is halved if memory runs out. Texts that cannot be scored get nan."""
        try:
            return self._forward(texts).tolist()
        except Exception as error:  # third-party models can raise anything, which must not stop a run
            reason = f"{type(error).__name__}: {error}"
            out_of_memory = is_out_of_memory(error)
        # This is outside the handler, because its traceback would keep the failed pass's tensors alive.
        if out_of_memory:
            clear_device_cache(garbage_collection=True)
        if out_of_memory and len(texts) > 1:
            half = len(texts) // 2
            self.batch_tokens = min(self.batch_tokens, max(half * _length(texts[-1]), 1))
            warn(
                f"not enough memory to score {len(texts)} texts at once; "
                f"continuing with batches of {self.batch_tokens} tokens"
            )
            return self._scores(texts[:half]) + self._scores(texts[half:])
        warn(f"the reward model failed on {len(texts)} texts, which get a neutral score ({reason})")
        return [math.nan] * len(texts)

    @torch.no_grad()
    def _forward(self, texts: list) -> torch.Tensor:
        """Score n texts, padded on the right. Returns (n,) float32 on the CPU."""
        if self.judges:
            return answer_log_probs(self.model, texts)[0].clamp(min=NO_ANSWER).cpu()
        # transformers scores the last token that is not padding. If the padding id occurred in a text (Llama
        # templates end in it), that would be the wrong token, so pad with an id that occurs in no text.
        used = {i for ids in texts for i in ids}
        pad = next(i for i in range(self.config.vocab_size) if i not in used)
        self.config.pad_token_id = pad
        longest = max(map(len, texts))
        ids = torch.tensor([[*ids, *[pad] * (longest - len(ids))] for ids in texts], device=self.device)
        mask = None  # causal attention never sees the padding behind a text, and is faster without a mask
        if not is_causal(self.model):
            mask = (
                (torch.arange(longest) < torch.tensor([[len(ids)] for ids in texts])).long().to(self.device)
            )
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits  # (n, 1)
        return logits[:, 0].float().cpu()


def reward_model_bytes(name: str, dtype: torch.dtype, load_in_8bit: bool) -> tuple[float, float, float]:
    """Bytes of a reward model's weights, of its activations while it scores, and of what is on the device if
    its layers stream. Only its configuration is read.

    Raises:
        InputError: The model cannot be found.
    """
    flag = f"--reward-model-name {name}"
    if name == EMBEDDED:
        model = skeleton(str(embedded_folder()), AutoModelForCausalLM, dtype, flag)
    else:
        path = resolve(name, "--reward-model-name")
        model = skeleton(path, AutoModelForSequenceClassification, dtype, flag, num_labels=1)
    linear = [m for key, m in model.named_modules() if isinstance(m, torch.nn.Linear) and key != "score"]
    saved = sum(m.weight.numel() for m in linear) * (dtype.itemsize - 1) if load_in_8bit else 0
    layers = [sum(w.numel() for w in layer.parameters()) for layer in layers_of(model)]
    weights = float(model.num_parameters() * dtype.itemsize - saved)
    piece = weights - float(sum(layers) - max(layers, default=0)) * dtype.itemsize
    return weights, scoring_bytes(model), piece


def scoring_bytes(model: PreTrainedModel) -> float:
    """Bytes of what a layer of a reward model computes for one batch: three times the MLP's inner size (gate,
    up and their product), and four times the hidden size.
    """
    config = model.config.get_text_config()
    inner = getattr(config, "intermediate_size", 4 * config.hidden_size)
    return float(BATCH_TOKENS * (3 * inner + 4 * config.hidden_size) * model.dtype.itemsize)


def layers_of(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The layers of a transformer: the members of its largest list of modules."""
    lists = [list(module) for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return max(lists, key=lambda layers: sum(w.numel() for m in layers for w in m.parameters()), default=[])


def stream_layers(model: PreTrainedModel, device: torch.device) -> set[torch.Tensor]:
    """Keep a model's layers in host memory, each except while it computes. Returns their weights."""
    streamed: set[torch.Tensor] = set()
    for layer in layers_of(model):
        offloaded, visit = Offloaded(layer.parameters, device), contextlib.ExitStack()

        def arrive(*_: Any, offloaded: Offloaded = offloaded, visit: contextlib.ExitStack = visit) -> None:
            visit.enter_context(offloaded.on_device())

        def leave(*_: Any, visit: contextlib.ExitStack = visit) -> None:
            visit.close()

        layer.register_forward_pre_hook(arrive)
        layer.register_forward_hook(leave, always_call=True)
        streamed |= set(layer.parameters())
    return streamed


def is_causal(model: PreTrainedModel) -> bool:
    """Whether every token of a model attends only to itself and to earlier tokens."""
    causal = [module.is_causal for module in model.modules() if hasattr(module, "is_causal")]
    return bool(causal) and all(causal)


def _length(text: tuple[int, ...] | JudgeText) -> int:
    return len(text.ids if isinstance(text, JudgeText) else text)


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, system_prompt: str | None, prompt: str, response: str, max_length: int
) -> tuple[tuple[int, ...], bool]:
    """Token ids of one conversation, built exactly as on AceMath's model card.

    There is no generation prompt, and only the template adds special tokens.

    Args:
        max_length: Limit in tokens. A longer conversation loses the start of its response.

    Returns:
        The ids, and whether the response was truncated.
    """
    messages = conversation(prompt, system_prompt, response)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    ids = tokenizer.encode(text, add_special_tokens=False)
    excess = len(ids) - max_length
    if excess > 0:  # the end of a solution says the most about it, so drop the start
        before = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        kept = len(tokenizer.encode(before, add_special_tokens=False))
        ids = ids[:kept] + ids[kept + excess :] if kept < max_length else ids[excess:]
    return tuple(ids), excess > 0


def load_classifier(
    model_name: str, dtype: torch.dtype, load_in_8bit: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a sequence classifier with one label, and its tokenizer, onto the CPU.

    Raises:
        InputError: The model cannot be found or loaded, lacks weights, or has no chat template.
    """
    flag = f"--reward-model-name {model_name}"
    path = resolve(model_name, "--reward-model-name")
    options = {"quantization_config": int8_config()} if load_in_8bit else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        # With num_labels=1, a checkpoint with several labels gets a new, random head, rejected below.
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            path,
            dtype=dtype,
            num_labels=1,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **PLAIN_OUTPUT,
            **options,
        )
    except Exception as error:  # a folder made elsewhere can be broken in any way
        raise InputError(f"{flag}: could not be loaded ({type(error).__name__}: {error})") from None
    random = list(loading["missing_keys"]) + [key[0] for key in loading["mismatched_keys"]]
    if random:
        raise InputError(
            f"{flag}: not a reward model with one label, because it has no weights for "
            f"{', '.join(random[:3])}; choose another reward model"
        )
    if tokenizer.chat_template is None:
        raise InputError(
            f"{flag}: its tokenizer has no chat template; set tokenizer.chat_template and save the tokenizer "
            "with save_pretrained"
        )
    return model, tokenizer


def int8_config() -> BitsAndBytesConfig:
    """Settings for from_pretrained: all linear layers but the score head in int8.

    The method is LLM.int8() (arXiv:2208.07339).

    Raises:
        InputError: bitsandbytes is not installed. It is not in requirements.txt, because peft would import it
            in every run, which takes a second and prints lines of its own.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            f"--reward-model-8bit: needs bitsandbytes, which is not installed; run: {INT8_INSTALL}"
        )
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["score"])


def system_prompt_for(model_name: str) -> str | None:
    """The system prompt that a reward model was trained with: AceMath has one, other models have none."""
    return ACEMATH_SYSTEM_PROMPT if "acemath" in model_name.lower() else None
