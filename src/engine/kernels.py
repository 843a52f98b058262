"""C++ kernels (src/engine/native) for what a Llama-like model computes on a CPU besides matrix products.

In PyTorch, every elementary step is a separate operation with its own pass over memory. A decode step of 64
rows consists of 1,500 such operations, which take half of its time. Each kernel here does several of them in
one pass (such as a residual sum and its norm, or the complete attention of one token) and uses SIMD. Without
a compiler, everything runs on the slower general path (see `llama.is_supported`).
"""

import ctypes
import functools

import torch

from src.engine.native_library import call, libraries

HEAD_SIZES = (16, 32, 64, 96, 128)  # the head dimensions that attention.cpp is compiled for
LANES = 16  # columns in a block of keys, as in vectors.h
ABSENT = (
    "no C++ compiler on this machine, so training on the CPU takes about twice as long; install one "
    "(Debian, Ubuntu: apt-get install g++; macOS: xcode-select --install)"
)


def are_compiled() -> bool:
    """Whether the kernels can be used; compiles them if necessary."""
    return libraries() is not None


@functools.lru_cache
def can_multiply_packed(dtype: torch.dtype) -> bool:
    """Whether `linear.PackedWeight` supports weights of this dtype on this machine.

    In bfloat16, it needs matrix units (AMX) or vector units that multiply this format (AVX512_BF16).
    """
    compiled = libraries()
    return compiled is not None and dtype in compiled and bool(compiled[dtype].can_multiply_packed())


# ----------------------------------------------------------------------------------------------------------
# Operations between a layer's matrix products. Shapes: n tokens, D hidden size, I inner size of the MLP, E
# head dimension. T is the model's compute dtype.


def add_norm(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Add to the residual stream, and normalize the sum.

    Args:
        x: (n, D) float32, the residual stream.
        delta: (n, D) in T, added to x; None adds nothing.
        weight: (D,) in T, the weight of the RMSNorm.
        eps: The epsilon of the RMSNorm.

    Returns:
        x + delta (n, D) float32, its RMSNorm (n, D) in T, and 1 / root mean square (n,) float32.
    """
    n, d = x.shape
    total = x if delta is None else torch.empty_like(x)
    y, scale = torch.empty(n, d, dtype=weight.dtype), torch.empty(n)
    call("add_norm", weight.dtype, x, delta, weight, eps, total, y, scale, n, d)
    return total, y, scale


def norm_backward(
    d_y: torch.Tensor,
    x: torch.Tensor,
    delta: torch.Tensor | None,
    scale: torch.Tensor,
    weight: torch.Tensor,
    d_x: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradient of the norm in `add_norm`.

    Args:
        d_y: (n, D) in T, the gradient of the norm's result.
        x, delta, weight: The arguments of `add_norm`.
        scale: (n,) float32, the scale that `add_norm` returned.
        d_x: (n, D) float32; the gradient of x + delta is added to it.

    Returns:
        d_x rounded to T, the norm's result (n, D), which is recomputed, and the gradient of the weight (D,)
        in T.
    """
    n, d = x.shape
    rounded, y, d_weight = torch.empty_like(d_y), torch.empty_like(d_y), torch.empty(d)
    call("norm_backward", d_y.dtype, d_y, x, delta, scale, weight, d_x, rounded, y, d_weight, n, d)
    return rounded, y, d_weight.to(d_y.dtype)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up (n, 2 I), with gate and up side by side -> silu(gate) * up (n, I)."""
    n, d = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(n, d)
    call("swiglu", gate_up.dtype, gate_up, out, n, d)
    return out


def swiglu_backward(d_out: torch.Tensor, gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of `swiglu`: d_out (n, I) -> d_gate_up (n, 2 I), and swiglu's recomputed result (n, I)."""
    d_gate_up, out = torch.empty_like(gate_up), torch.empty_like(d_out)
    call("swiglu_backward", gate_up.dtype, d_out, gate_up, d_gate_up, out, *d_out.shape)
    return d_gate_up, out


def rotate_(
    x: torch.Tensor, heads: int, cos: torch.Tensor, sin: torch.Tensor, backward: bool = False
) -> None:
    """Apply the rotary embedding to the first heads of x, in place.

    Args:
        x: (n, all heads, E) in T.
        heads: How many heads to rotate.
        cos, sin: (n, E) float32, from `llama.rotary`.
        backward: Whether x holds gradients, which are rotated back.
    """
    n, all_heads, head_dim = x.shape
    call("rotate", x.dtype, x, cos, sin, n, heads, all_heads, head_dim, int(backward))


# ----------------------------------------------------------------------------------------------------------
# Attention of consecutive sequences that share a prefix. The shapes are those of llama.py.


class NativeBlock(ctypes.Structure):
    """The struct Block of block.h: sequences whose attention is computed together."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("starts", "lengths", "prefix")),
        *(
            (name, ctypes.c_int64)
            for name in ("count", "longest", "prefix_length", "padded_keys", "heads", "kv_heads", "head_dim")
        ),
    )


def attend(blocks: list[NativeBlock], qkv: torch.Tensor, heads: int) -> torch.Tensor:
    """Causal attention, with results bit-identical to those of `Cache.attend`, which runs the same C++ code.

    Args:
        blocks: Blocks that together contain every token exactly once.
        qkv: (N, H + 2K, E) queries, keys and values; queries and keys are already rotated.
        heads: H.

    Returns:
        (N, H E).
    """
    out = qkv.new_empty(len(qkv), heads * qkv.shape[-1])
    for block in blocks:
        call("block_attention", qkv.dtype, block, qkv, out)
    return out


def attend_backward(
    blocks: list[NativeBlock], d_out: torch.Tensor, qkv: torch.Tensor, heads: int
) -> torch.Tensor:
    """The gradient of `attend`: d_out (N, H E) -> d_qkv (N, H + 2K, E).

    A prefix lies in an earlier block than the sequences that attend to it. The prefix's own gradients are
    therefore written before the gradients from later blocks are added to them.
    """
    d_qkv, all_heads = torch.empty_like(qkv), qkv.shape[1]
    for block in blocks:
        q, k, v = _gather(block, qkv)
        probs = _probs(block, q, k)
        d_attended = torch.empty_like(q)
        call("gather_queries", qkv.dtype, block, d_out, heads, d_attended)
        d_scores = d_attended @ v.transpose(1, 2)  # the gradient of probs until the next line replaces it
        call("causal_softmax_backward", qkv.dtype, block, probs, d_scores, block.head_dim**-0.5)
        call("scatter_queries", qkv.dtype, block, d_scores @ k, all_heads, d_qkv)
        d_k, d_v = d_scores.transpose(1, 2) @ q, probs.transpose(1, 2) @ d_attended
        call("scatter_keys_values", qkv.dtype, block, d_k, d_v, d_qkv)
    return d_qkv


def _gather(block: NativeBlock, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A block's queries (c K, share x l, E), keys and values (c K, m, E each), padded with zeros."""
    c, share = block.count * block.kv_heads, block.heads // block.kv_heads
    q = qkv.new_empty(c, share * block.longest, block.head_dim)
    k, v = (qkv.new_empty(c, block.padded_keys, block.head_dim) for _ in range(2))
    call("gather_queries", qkv.dtype, block, qkv, qkv.shape[1], q)
    call("gather_keys_values", qkv.dtype, block, qkv, k, v)
    return q, k, v


def _probs(block: NativeBlock, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Attention probabilities (c K, share x l, m)."""
    scores = q @ k.transpose(1, 2)
    call("causal_softmax", q.dtype, block, scores, block.head_dim**-0.5)
    return scores


# ----------------------------------------------------------------------------------------------------------
# Attention of one token for each row of a decode batch


class NativeCache(ctypes.Structure):
    """The struct Cache of attention.cpp: keys and values of one layer."""

    _fields_ = (
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("columns", ctypes.c_int64),
        ("slots", ctypes.c_void_p),
    )


class Cache:
    """Keys and values of the n rows of a decode batch.

    The rows of a group share their prompt's keys and values. Each row has its own keys and values for its
    completion.

    Args:
        layers, kv_heads, head_dim: The model's sizes.
        prompt_lengths: Number of tokens in each of the Q prompts.
        group_size: Rows per prompt.
        columns: Maximum number of tokens in a completion.
        dtype: The model's dtype.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        prompt_lengths: list[int],
        group_size: int,
        columns: int,
        dtype: torch.dtype,
    ):
        self.kv_heads, self.head_dim = kv_heads, head_dim
        self.filled = 0  # number of completion columns already written
        self.prompt_lengths = torch.tensor(prompt_lengths)  # (Q,)
        self.prompt_slots = torch.arange(len(prompt_lengths)).repeat_interleave(group_size)  # (n,)
        self.slots = torch.arange(len(self.prompt_slots))  # (n,) the slot of each row in `completions`
        self.columns, self.prompt_columns = (-(-c // LANES) * LANES for c in (columns, max(prompt_lengths)))
        # The system allocates memory pages only when they are first written to.
        self.completions, self.prompts = (
            torch.empty(layers, 2, n, kv_heads, c * head_dim, dtype=dtype)
            for n, c in ((len(self.slots), self.columns), (len(prompt_lengths), self.prompt_columns))
        )

    def put_prompt(self, layer: int, prompt: int, keys_values: torch.Tensor) -> None:
        """Store the keys and values (length, 2 K, E) of a prompt."""
        length, kv_heads, head_dim = len(keys_values), self.kv_heads, self.head_dim
        # (K, length, E) each
        keys, values = keys_values.view(length, 2, kv_heads, head_dim).permute(1, 2, 0, 3)
        padded = keys.new_zeros(kv_heads, self.prompt_columns, head_dim)
        padded[:, :length] = keys
        blocks = self.prompts[layer, 0, prompt].view(kv_heads, -1, head_dim, LANES)
        blocks.copy_(padded.view(kv_heads, -1, LANES, head_dim).transpose(2, 3))
        self.prompts[layer, 1, prompt].view(kv_heads, -1, head_dim)[:, :length] = values

    def attend(
        self, layer: int, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Store the key and value of one new token per row, and compute that token's attention.

        Args:
            layer: Index of the layer.
            qkv: (n, H + 2K, E), not rotated yet.
            cos, sin: (P, E) float32, from `llama.rotary`, for positions 0 to P - 1.
            positions: (n,) int64, the position of each token.

        Returns:
            (n, H E).
        """
        n, heads = len(qkv), qkv.shape[1] - 2 * self.kv_heads
        out = qkv.new_empty(n, heads * self.head_dim)
        own = _native_cache(self.completions[layer], self.columns, self.slots)
        prompts = _native_cache(self.prompts[layer], self.prompt_columns, self.prompt_slots)
        arguments = (qkv, cos, sin, positions, own, self.filled, prompts, self.prompt_lengths, out)
        call("decode_attention", qkv.dtype, *arguments, n, heads, self.kv_heads, self.head_dim)
        return out

    def advance(self) -> None:
        """Move on to the next token's column, after all layers have attended."""
        self.filled += 1

    def keep(self, rows: torch.Tensor) -> None:
        """Keep only these rows, without copying their keys and values."""
        self.slots, self.prompt_slots = self.slots[rows], self.prompt_slots[rows]


def _native_cache(keys_values: torch.Tensor, columns: int, slots: torch.Tensor) -> NativeCache:
    """The struct for one layer's keys and values (2, slots, K, columns x E). It points into the tensors."""
    keys, values = keys_values
    return NativeCache(keys.data_ptr(), values.data_ptr(), columns, slots.data_ptr())


# ----------------------------------------------------------------------------------------------------------
# Operations on logits (n, V) float32, where V is the size of the vocabulary or of a block of it.


def choose(
    logits: torch.Tensor, temperature: float, uniform: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample one token per row at a temperature, by inverse CDF.

    Args:
        uniform: (n,) float32, one random number in [0, 1) per row.

    Returns:
        The tokens (n,) int64, and their log-probs (n,) float32.
    """
    token, log_prob = torch.empty(len(logits), dtype=torch.long), torch.empty(len(logits))
    call("choose", torch.float32, logits, float(temperature), uniform, token, log_prob, *logits.shape)
    return token, log_prob


class CompiledLogSumExp:
    """A compiled version of `token_log_probs.LogSumExp`."""

    def __init__(self, targets: torch.Tensor, temperature: float):
        self.targets, self.temperature = targets, float(temperature)
        self.max_logit = torch.full((len(targets),), -torch.inf)
        self.sum = torch.zeros(len(targets))  # of exp(logit - max_logit)
        self.target_logits = torch.zeros(len(targets))

    def add(self, logits: torch.Tensor, start: int) -> None:
        state = (self.max_logit, self.sum, self.target_logits)
        arguments = (logits, self.temperature, self.targets, start, *state, *logits.shape)
        call("add_logits", torch.float32, *arguments)

    def value(self) -> torch.Tensor:
        return self.max_logit + self.sum.log()


def logits_backward_(
    logits: torch.Tensor, temperature: float, log_sum_exp: torch.Tensor, d_log_probs: torch.Tensor
) -> None:
    """Replace logits by the part of their gradient that comes from the softmax, without the targets' part.

    Args:
        logits: (n, v) in the model's dtype.
        log_sum_exp: (n,) float32, the log-sum-exp of each token's logits at this temperature.
        d_log_probs: (n,) float32, the gradient of the targets' log-probs.
    """
    arguments = (logits, float(temperature), log_sum_exp, d_log_probs, *logits.shape)
    call("logits_backward", logits.dtype, *arguments)
