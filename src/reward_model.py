"""The reward model: how good is this solution? AceMath-7B-RM, any sequence classifier with one label, or the embedded judge."""

import importlib.util
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from jinja2 import TemplateError
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from src.errors import InputError
from src.judge import NO_ANSWER, JudgeText, answer_log_probs, judge_text, load_judge, plain_answer
from src.memory import Plan
from src.models import EMBEDDED, embedded_folder, pick_dtype, resolve, skeleton

# Part of AceMath-7B-RM: it was trained with this system prompt (model card, "How to use").
ACEMATH_SYSTEM_PROMPT = "Please reason step by step, and check your final answer within \\boxed{}."
ACEMATH = "nvidia/AceMath-7B-RM"
INT8_INSTALL = "pip install bitsandbytes==0.50.2"


class AceRewardModel:
    """A frozen reward model that scores solutions.

    Args:
        model_name: Hub name or local folder of a sequence classifier with one label, or "embedded" for the one that comes
            with this repository (src/judge.py). The licence of the default is CC-BY-NC-4.0: not for commercial use.
        device, dtype: Where and in what it computes.
        system_prompt: System message of each conversation; None sends none. The default is AceMath's own, part of how it
            was trained. The embedded one reads no conversation but the question and the final answer.
        max_length: Tokens of the rendered conversation; a longer one loses the start of the response.
        batch_tokens: Tokens of a forward pass at most, padding included; halved for good when memory runs out.
        offload: Keep the weights in host memory (pinned) and on `device` only while scoring.
        load_in_8bit: Linear layers in int8 (bitsandbytes): half the memory of bfloat16.

    Attributes:
        failed, truncated: Responses that could not be scored, and that lost their start, so far.

    Raises:
        InputError: It cannot be found or loaded, or is not a reward model.
    """

    def __init__(
        self,
        model_name: str = ACEMATH,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        system_prompt: str | None = ACEMATH_SYSTEM_PROMPT,
        max_length: int = 4096,
        batch_tokens: int = 8192,
        offload: bool = False,
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
        self.homes: list[torch.Tensor] | None = None
        if offload:
            self.homes = []
            for weight in self.model.parameters():
                weight.data = weight.data.clone()  # out of the file's mapping
                self.homes.append(weight.data)
                if self.device.type == "cuda":
                    # Pins what is there; pin_memory() would round each block up to a power of two. Where the system
                    # refuses, transfers are slower and all else is the same.
                    torch.cuda.cudart().cudaHostRegister(weight.data.data_ptr(), weight.data.nbytes, 0)
            for buffer in self.model.buffers():  # rotary frequencies: a few kilobytes
                buffer.data = buffer.data.to(self.device)
        else:
            self.model.to(self.device)  # type: ignore[arg-type]  # wrapped such that its type takes the model for an argument
        self.system = [{"role": "system", "content": system_prompt}] if system_prompt else []
        try:
            self.encode("question", "response")
        except TemplateError as error:
            raise InputError(f"--reward-model-name {model_name}: its chat template refuses the conversation ({error})") from None

    def encode(self, prompt: str, response: str) -> tuple[int, ...]:
        """Token ids of one conversation; see `encode_conversation`."""
        ids, cut = encode_conversation(self.tokenizer, self.system, prompt, response, self.max_length)
        self.truncated += cut
        return ids

    def compute_reward(self, prompt: str, response: str) -> float:
        """Raw score of one response; see `compute_batch_reward`."""
        return self.compute_batch_reward(prompt, [response])[0].item()

    def compute_batch_reward(self, prompt: str | list[str], responses: list[str]) -> torch.Tensor:
        """Raw scores of responses to one question, or to one question each.

        Args:
            prompt: The question, or one question per response.
            responses: B texts.

        Returns:
            (B,) float32 on the CPU. A response that could not be scored (out of memory, a score that is not finite)
            scores 0.0 and is counted in `self.failed`; scoring never stops a run.
        """
        return self.score_texts(prompt, responses).nan_to_num(0.0)

    def score_texts(self, prompt: str | list[str], responses: list[str]) -> torch.Tensor:
        """As `compute_batch_reward`, with nan for a response that could not be scored."""
        prompts = [prompt] * len(responses) if isinstance(prompt, str) else prompt
        pairs = list(zip(prompts, responses, strict=True))
        # Each text once: its score must not depend, by a rounding error, on the batch that it happens to be in.
        read = {pair: self._read(*pair) for pair in dict.fromkeys(pairs)}
        score_of: dict = dict.fromkeys(read.values(), math.nan)
        score_of[None] = NO_ANSWER  # only the judge reads nothing in a text
        texts = sorted((text for text in score_of if text is not None), key=_length)  # little padding in a batch
        try:
            with self._on_device():
                while texts:
                    fitting = self._fitting(texts)
                    batch, texts = texts[:fitting], texts[fitting:]
                    score_of |= zip(batch, self._scores(batch), strict=True)
        except RuntimeError as error:  # no room on the device for the weights themselves
            print(f"warning: the reward model could not be moved to {self.device} ({error}); neutral scores", flush=True)
        scores = torch.tensor([score_of[read[pair]] for pair in pairs])  # (B,)
        scores = torch.where(scores.isfinite(), scores, torch.nan)
        self.failed += int(scores.isnan().sum())
        return scores

    def _read(self, prompt: str, response: str) -> tuple[int, ...] | JudgeText | None:
        if not self.judges:
            return self.encode(prompt, response)
        answer = plain_answer(prompt, response)
        return None if answer is None else judge_text(self.tokenizer, prompt, answer)

    def _fitting(self, texts: list) -> int:
        """How many of texts sorted by length make a batch of at most `batch_tokens` tokens, at least one."""
        fitting = 1
        while fitting < len(texts) and (fitting + 1) * _length(texts[fitting]) <= self.batch_tokens:
            fitting += 1
        return fitting

    def _scores(self, texts: list) -> list[float]:
        """Scores of one batch, in halves where memory runs out; nan where that does not help."""
        try:
            return self._forward(texts).tolist()
        except Exception as error:  # whatever a model of somebody else's raises: scoring does not stop a run
            reason = f"{type(error).__name__}: {error}"
            out_of_memory = isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)
        # Outside of the handler, whose traceback would keep the failed pass's tensors alive.
        if out_of_memory:
            clear_device_cache(garbage_collection=True)
        if out_of_memory and len(texts) > 1:
            half = len(texts) // 2
            self.batch_tokens = min(self.batch_tokens, max(half * _length(texts[-1]), 1))
            print(f"warning: no memory to score {len(texts)} texts at once; batches of {self.batch_tokens} tokens", flush=True)
            return self._scores(texts[:half]) + self._scores(texts[half:])
        print(f"warning: the reward model failed on {len(texts)} texts, which get a neutral score ({reason})", flush=True)
        return [math.nan] * len(texts)

    @torch.no_grad()
    def _forward(self, texts: list) -> torch.Tensor:
        """Scores (n,) float32 on the CPU of n texts, padded on the right."""
        if self.judges:
            return answer_log_probs(self.model, texts)[0].clamp(min=NO_ANSWER).cpu()
        # transformers takes the last token that is not padding as the one that is scored: with a padding id that occurs
        # in the text (Llama templates end in it) that would be the wrong one, so an id that does not occur serves.
        used = {i for ids in texts for i in ids}
        pad = next(i for i in range(self.config.vocab_size) if i not in used)
        self.config.pad_token_id = pad
        longest = max(map(len, texts))
        ids = torch.tensor([[*ids, *[pad] * (longest - len(ids))] for ids in texts], device=self.device)
        mask = (torch.arange(longest) < torch.tensor([[len(ids)] for ids in texts])).to(self.device)
        return self.model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits[:, 0].float().cpu()

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """With `offload`, the weights on the device for as long as this lasts; the copies in host memory stay as they are."""
        if self.homes is None:
            yield
            return
        try:
            for weight, home in zip(self.model.parameters(), self.homes, strict=True):
                weight.data = home.to(self.device, non_blocking=True)
            yield
        finally:
            for weight, home in zip(self.model.parameters(), self.homes, strict=True):
                weight.data = home
            clear_device_cache()


def _length(text: tuple[int, ...] | JudgeText) -> int:
    return len(text.ids if isinstance(text, JudgeText) else text)


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, system: list[dict], prompt: str, response: str, max_length: int
) -> tuple[tuple[int, ...], bool]:
    """Token ids of one conversation, exactly as on AceMath's model card: no generation prompt, no special tokens added.

    Args:
        system: A system message in a list, or an empty list.
        max_length: Tokens at most; a longer conversation loses the start of its response.

    Returns:
        The ids, and whether it lost anything.
    """
    head = [*system, {"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(
        [*head, {"role": "assistant", "content": response}], tokenize=False, add_generation_prompt=False
    )
    ids = tokenizer.encode(text, add_special_tokens=False)
    excess = len(ids) - max_length
    if excess > 0:  # the end of a solution says most about it: cut the response from the left
        before = tokenizer.apply_chat_template(head, tokenize=False, add_generation_prompt=True)
        kept = len(tokenizer.encode(before, add_special_tokens=False))
        ids = ids[:kept] + ids[kept + excess :] if kept < max_length else ids[excess:]
    return tuple(ids), excess > 0


def load_classifier(model_name: str, dtype: torch.dtype, load_in_8bit: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A sequence classifier with one label and its tokenizer, on the CPU.

    Raises:
        InputError: It cannot be found or loaded, has weights missing, or no chat template.
    """
    flag = f"--reward-model-name {model_name}"
    path = resolve(model_name, "--reward-model-name")
    options = {"quantization_config": int8_config()} if load_in_8bit else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        # One label asked for: a checkpoint with several would load with a new, random head.
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            path, dtype=dtype, num_labels=1, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except Exception as error:  # a folder made elsewhere can be broken in any way
        raise InputError(f"{flag}: could not be loaded ({type(error).__name__}: {error})") from None
    random = list(loading["missing_keys"]) + [key[0] for key in loading["mismatched_keys"]]
    if random:
        raise InputError(f"{flag}: not a reward model with one label; without weights: {', '.join(random[:3])}")
    if tokenizer.chat_template is None:
        raise InputError(f"{flag}: its tokenizer has no chat template")
    return model, tokenizer


def int8_config() -> BitsAndBytesConfig:
    """For from_pretrained: linear layers in int8 (LLM.int8(), arXiv:2208.07339), the score head left as it is.

    Raises:
        InputError: bitsandbytes is not installed. It is not in requirements.txt: where it is installed, every run imports it
            with peft, which takes a second and prints lines of its own.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(f"--reward-model-8bit: needs bitsandbytes, which is not installed; run: {INT8_INSTALL}")
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["score"])


@dataclass(frozen=True)
class RewardModelChoice:
    """Which reward model a run uses, where and in what; from `choose_reward_model`."""

    name: str | None  # None: the verifier alone decides
    why: str
    placement: str = "device"  # as Plan.reward_placement
    device: torch.device | None = None
    dtype: torch.dtype = torch.float32
    load_in_8bit: bool = False
    weights: float = 0.0  # bytes
    failed: bool = False  # it was wanted, but cannot be had

    def where(self) -> str:
        assert self.device is not None
        places = {"device": self.device.type, "cpu": "cpu", "offload": f"{self.device.type} while it scores"}
        return places[self.placement] + (", int8" if self.load_in_8bit else "")

    def added_to(self, plan: Plan) -> Plan:
        """The plan of a run with it, of that of the run without."""
        return replace(plan, reward_weights=self.weights, reward_placement=self.placement)

    def load(self) -> AceRewardModel:
        assert self.name is not None and self.device is not None
        return AceRewardModel(
            self.name, self.device, self.dtype, system_prompt_for(self.name),
            offload=self.placement == "offload", load_in_8bit=self.load_in_8bit,
        )  # fmt: skip


def choose_reward_model(
    requested: str,
    placement: str,
    load_in_8bit: bool,
    policy_name: str,
    plan: Plan,
    device: torch.device,
    dtype: torch.dtype,
    free: float,
    host_free: float,
) -> RewardModelChoice:
    """Settle `--reward-model-name auto` and `--reward-model-device auto`, from configurations alone.

    Args:
        requested, placement, load_in_8bit: The flags' values.
        policy_name: "embedded" has the embedded reward model beside it.
        plan: Of the run without a reward model.
        device, dtype: Where the policy computes, and in what.
        free, host_free: Bytes free on the device and in the host's memory.

    Raises:
        InputError: The placement asked for cannot be.
    """
    if requested == "none":
        return RewardModelChoice(None, "--reward-model-name none")
    name, why = requested, "asked for"
    if requested == "auto":
        if policy_name == EMBEDDED:
            name, why = EMBEDDED, "auto: it comes with the embedded policy"
        elif device.type == "cuda":
            name, why = ACEMATH, "auto"
        else:
            return RewardModelChoice(None, f"auto: {ACEMATH} needs a GPU, and this run is on {device.type}")
    places = _places(placement, requested != "auto", load_in_8bit, device)
    if load_in_8bit and name == EMBEDDED:
        raise InputError("--reward-model-8bit: the embedded reward model has no int8 form; it takes 0.3 GB as it is")
    options, cpu = [], torch.device("cpu")
    for place in places:
        where, what = (cpu, pick_dtype(cpu, "auto")) if place == "cpu" else (device, dtype)
        try:
            weights = reward_model_bytes(name, what, load_in_8bit)
        except InputError as error:
            return RewardModelChoice(None, str(error), failed=True)
        options.append(RewardModelChoice(name, why, place, where, what, load_in_8bit, weights))
    if len(options) == 1 and requested != "auto":
        return options[0]
    with_room = [o for o in options if o.placement == "device" or o.weights <= host_free]
    for option in with_room:
        if option.added_to(plan).most() <= free:
            return option
    if name == EMBEDDED:
        return options[0]
    if requested != "auto":  # what may fit, or else a refusal that names the ways out
        return next((o for o in with_room if o.added_to(plan).least() <= free), options[0])
    needed = replace(plan, reward_weights=options[0].weights).most()
    why = f"auto: {ACEMATH} and the policy need up to {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
    return RewardModelChoice(None, why)


def _places(placement: str, asked_for: bool, load_in_8bit: bool, device: torch.device) -> list[str]:
    """Where the reward model may go, as `RewardModelChoice.placement`, the best first.

    Args:
        placement, load_in_8bit: The flags' values.
        asked_for: By name, not by --reward-model-name auto.
        device: Where the policy computes.

    Raises:
        InputError: There is no such placement beside that device.
    """
    if placement in ("cuda", "offload") and device.type != "cuda":
        raise InputError(f"--reward-model-device {placement}: this run is on {device.type}; leave it at auto")
    if placement == "cuda" or device.type == "cpu":
        return ["device"]
    if placement != "auto":
        return [placement]
    places = ["device"]
    if device.type == "cuda" and not load_in_8bit:
        places.append("offload")
    if asked_for:  # on the CPU a model of 7 billion weights takes minutes a step
        places.append("cpu")
    return places


def reward_model_bytes(name: str, dtype: torch.dtype, load_in_8bit: bool) -> float:
    """Memory of a reward model's weights, from its configuration alone.

    Raises:
        InputError: It cannot be found.
    """
    flag = f"--reward-model-name {name}"
    if name == EMBEDDED:
        return float(skeleton(str(embedded_folder()), AutoModelForCausalLM, dtype, flag).num_parameters() * dtype.itemsize)
    model = skeleton(resolve(name, "--reward-model-name"), AutoModelForSequenceClassification, dtype, flag, num_labels=1)
    linear = sum(m.weight.numel() for key, m in model.named_modules() if isinstance(m, torch.nn.Linear) and key != "score")
    return float(model.num_parameters() * dtype.itemsize - (linear * (dtype.itemsize - 1) if load_in_8bit else 0))


def system_prompt_for(model_name: str) -> str | None:
    """The system message that a reward model was trained with: AceMath's for AceMath, none for others."""
    return ACEMATH_SYSTEM_PROMPT if "acemath" in model_name.lower() else None
