"""The reward model: how good is this solution? AceMath-7B-RM, or any sequence classifier with one label."""

import torch
from jinja2 import TemplateError
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from src.errors import InputError
from src.models import resolve

# Part of AceMath-7B-RM: it was trained with this system prompt (model card, "How to use").
ACEMATH_SYSTEM_PROMPT = "Please reason step by step, and check your final answer within \\boxed{}."
ACEMATH = "nvidia/AceMath-7B-RM"
ACEMATH_PARAMETERS = 7.07e9


class AceRewardModel:
    """A frozen reward model that scores solutions.

    Args:
        model_name: Hub name or local folder of a sequence classifier with one label. The licence of the default is
            CC-BY-NC-4.0: not for commercial use.
        device, dtype: Where and in what it computes.
        system_prompt: System message of each conversation; None sends none. The default is AceMath's own, part of how it
            was trained.
        max_length: Tokens of the rendered conversation; a longer one loses the start of the response.
        batch_size: Conversations per forward pass.

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
        batch_size: int = 8,
    ):
        path = resolve(model_name, "--reward-model-name")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path)
            # One label asked for: a checkpoint with several would load with a new, random head.
            self.model, loading = AutoModelForSequenceClassification.from_pretrained(
                path, dtype=dtype, num_labels=1, output_loading_info=True, ignore_mismatched_sizes=True
            )
        except Exception as error:  # a folder made elsewhere can be broken in any way
            raise InputError(f"--reward-model-name {model_name}: could not be loaded ({type(error).__name__}: {error})") from None
        random = list(loading["missing_keys"]) + [key[0] for key in loading["mismatched_keys"]]
        if random:
            raise InputError(
                f"--reward-model-name {model_name}: not a reward model with one label; without weights: {', '.join(random[:3])}"
            )
        if self.tokenizer.chat_template is None:
            raise InputError(f"--reward-model-name {model_name}: its tokenizer has no chat template")
        self.model.to(device).eval().requires_grad_(False)
        self.system = [{"role": "system", "content": system_prompt}] if system_prompt else []
        self.max_length = max_length
        self.batch_size = batch_size
        self.failed = 0  # responses that could not be scored, so far
        try:
            self.encode("question", "response")
        except TemplateError as error:
            raise InputError(f"--reward-model-name {model_name}: its chat template refuses the conversation ({error})") from None

    def encode(self, prompt: str, response: str) -> list[int]:
        """Token ids of one conversation, exactly as on AceMath's model card: no generation prompt, no special tokens added."""
        head = [*self.system, {"role": "user", "content": prompt}]
        text = self.tokenizer.apply_chat_template(
            [*head, {"role": "assistant", "content": response}], tokenize=False, add_generation_prompt=False
        )
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        excess = len(ids) - self.max_length
        if excess > 0:  # the end of a solution says most about it: cut the response from the left
            before = self.tokenizer.apply_chat_template(head, tokenize=False, add_generation_prompt=True)
            kept = len(self.tokenizer.encode(before, add_special_tokens=False))
            ids = ids[:kept] + ids[kept + excess :]
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
        distinct = {pair: i for i, pair in enumerate(dict.fromkeys(pairs))}
        encoded = [self.encode(p, r) for p, r in distinct]
        scores = torch.full((len(encoded),), torch.nan)
        by_length = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))  # little padding in a batch
        for start in range(0, len(by_length), self.batch_size):
            rows = by_length[start : start + self.batch_size]
            try:
                scores[rows] = self._forward([encoded[i] for i in rows])
            except RuntimeError as error:  # out of memory above all
                print(f"warning: the reward model failed on {len(rows)} texts, which get a neutral score ({error})", flush=True)
        scores = torch.where(scores.isfinite(), scores, torch.nan)[[distinct[pair] for pair in pairs]]  # (B,)
        self.failed += int(scores.isnan().sum())
        return scores

    @torch.no_grad()
    def _forward(self, encoded: list[list[int]]) -> torch.Tensor:
        """Scores (n,) float32 on the CPU of n lists of token ids, padded on the right."""
        # transformers takes the last token that is not padding as the one that is scored: with a padding id that occurs
        # in the text (Llama templates end in it) that would be the wrong one, so an id that does not occur serves.
        used = {i for ids in encoded for i in ids}
        pad = next(i for i in range(self.model.config.vocab_size) if i not in used)
        self.model.config.pad_token_id = pad
        longest = max(map(len, encoded))
        ids = torch.tensor([e + [pad] * (longest - len(e)) for e in encoded], device=self.model.device)
        mask = (torch.arange(longest) < torch.tensor([[len(e)] for e in encoded])).to(ids.device)
        return self.model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits[:, 0].float().cpu()


def system_prompt_for(model_name: str) -> str | None:
    """The system message that a reward model was trained with: AceMath's for AceMath, none for others."""
    return ACEMATH_SYSTEM_PROMPT if "acemath" in model_name.lower() else None


def choose_reward_model(
    requested: str, policy_name: str, policy_parameters: int, device: torch.device, dtype: torch.dtype
) -> tuple[str | None, str]:
    """Settle `--reward-model-name auto` and `none`, once the policy is loaded.

    Args:
        requested: The flag's value.
        policy_name: The policy's name; "embedded" is trained without a reward model of 14 GB.
        policy_parameters: Weights of the policy that are trained.
        device, dtype: Where the run computes, and in what.

    Returns:
        The name to load, or None, and the reason in words.
    """
    if requested == "none":
        return None, "--reward-model-name none"
    if requested != "auto":
        return requested, "asked for"
    if policy_name == "embedded":
        return None, "auto: none is embedded beside the embedded policy"
    if device.type != "cuda":
        return None, f"auto: {ACEMATH} needs a GPU, and this run is on {device.type}"
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(device)[0]
    # What is still to come: the reward model; per weight of the policy 4 bytes of gradient, 8 of Adam's moments and 2 of
    # the gradient in bfloat16; and 4 GB for activations and caches.
    needed = ACEMATH_PARAMETERS * dtype.itemsize + 14 * policy_parameters + 4e9
    if free < needed:
        return (
            None,
            f"auto: {ACEMATH} and the training of the policy need {needed / 1e9:.0f} GB, and {free / 1e9:.0f} GB are free",
        )
    return ACEMATH, f"auto: {free / 1e9:.0f} GB are free on the GPU, {needed / 1e9:.0f} GB needed"
