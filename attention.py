"""Attention: one function for vision, self- and cross-attention; the names that are allowed; the mask of
self-attention.

Axes: B rows (or frames), T query tokens of a call, S key tokens including those of the cache, H query heads, K
key/value heads, G = H / K heads of a group, d head size. In this file, "row" means a row of the scores: one query
token.
"""

import inspect
import re
from collections.abc import Callable
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig
from transformers.cache_utils import Cache
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from .cache_layers import cached_length, static_length


logger = logging.get_logger(__name__)

HALF = (torch.float16, torch.bfloat16)
# Whether this CPU multiplies matrices in bfloat16.
CPU_BFLOAT16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
FLASH_HEAD_SIZE = 256  # largest head size of torch's flash-attention
CPU_SCORES = 1 << 22  # most attention scores in memory at once in `blockwise_attention_forward`
# An additive mask of this or less masks a token out: callers write the lowest number of some dtype, or -inf.
MASKED = torch.finfo(torch.float16).min

ALLOWED_NAMES = (
    "'eager', 'sdpa', 'flash_attention_2', 'flash_attention_3', 'flash_attention_4', a flash-attention kernel of the "
    "`kernels` package ('owner/name'), or a function that you registered with the contract of transformers' sdpa (a "
    "mask [B, 1, T, S], or None and `is_causal`)"
)


# Names


def attention_kind(name: str) -> str:
    """Decides how the attention function of this name is called, and whether the name is allowed.

    Returns:
        "eager"; "sdpa" for the one of transformers; "flash", which takes padding as [B, S] and a flag for causality;
        "function" for a user's, which is called like sdpa.

    Raises:
        ValueError: if the name is unknown, or its function has another contract (paged and flex take no `is_causal`,
            need special masks, or add a bool mask to the scores).
    """
    if name == "eager":
        return "eager"
    is_name = isinstance(name, str)
    function = ALL_ATTENTION_FUNCTIONS.get(name) if is_name else None
    while isinstance(function, partial):
        function = function.func
    if function is sdpa_attention_forward:
        return "sdpa"
    if function is flash_attention_forward or (is_name and re.fullmatch(r"flash_attention_[234]", name)):
        return "flash"
    if is_name and function is None and is_kernel_name(name):
        raise ValueError(
            f"The attention kernel {name!r} is not loaded; expected `attn_implementation=` or "
            f"`set_attn_implementation`, which load it."
        )
    if function is not None and is_users(name, function):
        return "function"
    raise ValueError(f"The attention implementation {name!r} cannot be used by MOSS-VL; expected {ALLOWED_NAMES}.")


def is_users(name: str, function: Callable) -> bool:
    """Whether a user registered this function for masks as sdpa takes them."""
    if "/" in name or name.startswith("paged|") or getattr(function, "__module__", "").startswith("transformers."):
        return False
    make_mask = ALL_MASK_ATTENTION_FUNCTIONS.get(name)  # makes its masks in the models of transformers
    return make_mask is None or make_mask is ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]


def is_kernel_name(name: str) -> bool:
    """Whether the name is that of a kernel of the `kernels` package ("owner/name"). Loading a kernel registers its
    function."""
    return "/" in name and not name.startswith("paged|")


def check_implementations(config: PretrainedConfig) -> None:
    """Checks the names in a config, which a user may have assigned without any check.

    Raises:
        ValueError: see `attention_kind`.
    """
    text, vision = getattr(config, "text_config", config), getattr(config, "vision_config", None)
    for part, name in (
        (text, "_attn_implementation"),
        (text, "cross_attention_implementation"),
        (vision, "_attn_implementation"),
    ):
        if getattr(part, name, None) is not None:
            attention_kind(getattr(part, name))


def usable_implementation(name: Optional[str], states: torch.Tensor, need_weights: bool = False) -> str:
    """The attention implementation for this call: eager if weights are needed, sdpa if flash-attention cannot run.

    Raises:
        ValueError: if the name is not allowed, see `attention_kind`.
    """
    name = "sdpa" if name is None else name
    kind = attention_kind(name)
    if need_weights:
        return "eager"
    if kind == "flash" and not flash_can_run(states.device.type, compute_dtype(states)):
        logger.warning_once(
            f"{name} does not run on {states.device.type} in {compute_dtype(states)}; sdpa is used. Load the model in "
            f"bfloat16 on CUDA."
        )
        return "sdpa"
    return name


def flash_can_run(device: str, dtype: torch.dtype) -> bool:
    """Whether flash-attention runs on this type of device in this dtype."""
    return device != "cpu" and dtype in HALF


def compute_dtype(states: torch.Tensor) -> torch.dtype:
    """The dtype of matrix products with these states: that of autocast if it is on."""
    device = states.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return states.dtype


# Kernels


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Optional[torch.Tensor],
    implementation: str,
    *,
    causal: bool = False,
    dropout: float = 0.0,
    texts: Optional[dict] = None,
) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
    """One attention call: query [B, H, T, d], key and value [B, K, S, d].

    `mask`, `causal` and `texts` are those of `SelfAttentionMask`. A causal call either has no mask and T = S, or uses
    flash-attention, whose queries are the last T of S tokens.

    Returns:
        [B, T, H, d], and the weights [B, H, T, S] if the implementation is eager, else None.
    """
    dropout = dropout if module.training else 0.0
    causal = causal and query.shape[2] > 1  # a single query is the last token, so no key is later
    kind = attention_kind(implementation)
    if kind == "eager":
        mask = lower_triangle(query) if causal else mask
        return eager_attention_forward(module, query, key, value, mask, module.scaling, dropout)
    if kind == "flash":
        out = flash_attention(module, query, key, value, mask, implementation, causal, dropout, texts or {})
    elif kind == "function":
        out = users_attention(module, query, key, value, mask, implementation, causal, dropout)
    elif prefers_blockwise(query, key, dropout):
        out = blockwise_attention_forward(module, query, key, value, mask, module.scaling, causal)
    else:
        out = sdpa_attention(module, query, key, value, mask, implementation, causal, dropout)
    return out, None


def attend_token(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Optional[torch.Tensor],
    implementation: str,
) -> torch.Tensor:
    """`attend` for one token per row, with few operations on the host: query [B, H, 1, d], key and value
    [B, K, S, d], mask bool [B or 1, 1, 1, S]; or one batch of key and value for all rows, and mask [1, 1, B or 1, S].

    Returns:
        [B, 1, H * d].
    """
    (rows, heads, _, d), (batch, kv_heads) = query.shape, key.shape[:2]
    group = heads // kv_heads
    shared = batch < rows
    kind = attention_kind(implementation)
    if kind != "sdpa" or prefers_blockwise(query, key, 0.0) or takes_named_kernels(query):
        query = query.transpose(0, 2) if shared else query  # [1, H, B, d]
        out, _ = attend(module, query, key, value, mask, implementation)
        return out.reshape(rows, 1, heads * d)
    if not shared:
        query = query.view(rows, kv_heads, group, d)
        out = F.scaled_dot_product_attention(query, key, value, mask, scale=module.scaling)
        return out.reshape(rows, 1, heads * d)
    query = query.view(rows, kv_heads, group, d).transpose(0, 1).reshape(1, kv_heads, rows * group, d)
    if mask is not None and mask.shape[2] > 1:
        mask = mask.repeat_interleave(group, dim=2)
    out = F.scaled_dot_product_attention(query, key, value, mask, scale=module.scaling)
    return out.view(kv_heads, rows, group, d).transpose(0, 1).reshape(rows, 1, heads * d)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Optional[torch.Tensor],
    scaling: float,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention written out. query [B, H, T, d], key and value [B, K, S, d], mask bool (True = visible) or
    additive, [B or 1, 1 or H, T or 1, S].

    Grouped queries: the heads of a group are folded into the row axis, so keys and values are not repeated.

    Returns:
        [B, T, H, d] and the weights [B, H, T, S].
    """
    (batch, heads, rows, d), kv_heads = query.shape, key.shape[1]
    grouped = (query * scaling).reshape(batch, kv_heads, -1, d)  # [B, K, G * T, d]; scaled before the larger product
    scores = product(grouped, key.transpose(2, 3)).view(batch, heads, rows, -1)
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, float("-inf"))
        else:
            scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1)  # computed in float32 whatever the dtype, rounded at the end
    dropped = F.dropout(weights, p=dropout, training=module.training)
    out = product(dropped.view(batch, kv_heads, -1, key.shape[2]), value)
    return out.view(batch, heads, rows, -1).transpose(1, 2), weights


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left [B, K, m, d] @ right [B, K, d, n]. torch's batched product of a single bfloat16 matrix on a CPU copies it
    first, and takes three times as long as the plain one."""
    if left.shape[:2] == (1, 1):
        return (left[0, 0] @ right[0, 0])[None, None]
    return left @ right


def blockwise_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Optional[torch.Tensor],
    scaling: float,
    causal: bool = False,
) -> torch.Tensor:
    """`eager_attention_forward` over blocks of samples and rows, so that at most `CPU_SCORES` scores (or those of one
    row) are in memory at once. Returns [B, T, H, d]."""
    (batch, heads, rows, d), length = query.shape, key.shape[2]
    rows_per_block = min(rows, max(1, CPU_SCORES // (heads * length)))
    samples_per_block = max(1, CPU_SCORES // (heads * length * rows))
    out = query.new_empty(batch, rows, heads, d)
    for first_sample in range(0, batch, samples_per_block):
        samples = slice(first_sample, first_sample + samples_per_block)
        for first_row in range(0, rows, rows_per_block):
            block = slice(first_row, min(first_row + rows_per_block, rows))
            visible, block_mask = slice(0, length), None
            if causal:
                visible = slice(0, block.stop)
                shape = (1, 1, block.stop - first_row, block.stop)
                block_mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril(first_row)
            elif mask is not None:
                block_mask = mask.expand(batch, -1, rows, -1)[samples, :, block]
            parts = query[samples, :, block], key[samples, :, visible], value[samples, :, visible]
            out[samples, block], _ = eager_attention_forward(module, *parts, block_mask, scaling)
    return out


def prefers_blockwise(query: torch.Tensor, key: torch.Tensor, dropout: float) -> bool:
    """Whether `blockwise_attention_forward` is faster than sdpa: on CPUs with bfloat16 products. torch's sdpa on a CPU
    is no faster in bfloat16 than in float32, but two matrix products and a softmax are."""
    return (
        not (torch.is_grad_enabled() or dropout)
        and query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and CPU_BFLOAT16
        and (query.shape[2] > 1 or key.is_contiguous())
    )


def flash_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Optional[torch.Tensor],
    implementation: str,
    causal: bool,
    dropout: float,
    texts: dict,
) -> torch.Tensor:
    """Calls flash-attention with a mask of padding [B, S]. Returns [B, T, H, d].

    Raises:
        ValueError: if the installed transformers lacks this version of flash-attention.
    """
    attention = ALL_ATTENTION_FUNCTIONS.get(implementation)
    if attention is None:
        raise ValueError(
            f"The installed transformers has no {implementation!r}; expected another version of flash-attention or "
            "sdpa."
        )
    dtype = compute_dtype(value)  # keys of a cache may have another dtype
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scaling = module.scaling
    if module.config._attn_implementation != implementation:
        # transformers reads the name of the kernel from the config, but cross-attention may use another kernel.
        config = SimpleNamespace(_attn_implementation=implementation)
        module = SimpleNamespace(config=config, is_causal=module.is_causal, modules=module.modules)
    out, _ = attention(module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=causal, **texts)
    return out


def users_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Optional[torch.Tensor],
    implementation: str,
    causal: bool,
    dropout: float,
) -> torch.Tensor:
    """Calls a function that a user registered. If it has no parameter `is_causal`, it gets a causal mask."""
    attention = ALL_ATTENTION_FUNCTIONS.get(implementation)
    if causal and not takes_causality(attention):
        mask, causal = lower_triangle(query), False
    out, _ = attention(module, query, key, value, mask, dropout=dropout, scaling=module.scaling, is_causal=causal)
    return out


@lru_cache
def takes_causality(function: Callable) -> bool:
    """Whether a function names `is_causal` among its parameters."""
    return "is_causal" in inspect.signature(function).parameters


def sdpa_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Optional[torch.Tensor],
    implementation: str,
    causal: bool,
    dropout: float,
) -> torch.Tensor:
    """torch's sdpa. Returns [B, T, H, d].

    Grouped queries: the heads of a group are folded into the row axis, so each key is read once. A causal call cannot
    be folded. A mask of several rows is repeated for each head of a group, if that copies less than repeated keys
    would.
    """
    (batch, heads, rows, d), kv_heads = query.shape, key.shape[1]
    group_size = heads // kv_heads
    named = takes_named_kernels(query)
    if named and mask is None:
        return flash_kernel(*in_one_dtype(query, key, value), causal, dropout, module.scaling)
    mask_per_head = mask is not None and mask.shape[1] > 1
    if rows == 1 or mask is None:
        folds, repeats_mask = not causal, False
    else:
        folds = repeats_mask = not (causal or mask_per_head) and mask.numel() * group_size <= key.numel()
    if group_size == 1 or not folds:
        if named:
            key, value = (part.repeat_interleave(group_size, dim=1) for part in (key, value))
            return efficient_kernel(*in_one_dtype(query, key, value), mask, dropout, module.scaling).transpose(1, 2)
        attention = ALL_ATTENTION_FUNCTIONS.get(implementation)
        out, _ = attention(module, query, key, value, mask, dropout=dropout, scaling=module.scaling, is_causal=causal)
        return out
    if repeats_mask:
        mask = mask.expand(-1, -1, rows, -1).repeat(1, 1, group_size, 1)  # [B or 1, 1, G * T, S]
    elif mask_per_head:
        mask = mask.reshape(len(mask), kv_heads, group_size, -1)  # one row: [B or 1, K, G, S]
    grouped = query.reshape(batch, kv_heads, -1, d)  # [B, K, G * T, d]
    if named:
        out = efficient_kernel(*in_one_dtype(grouped, key, value), mask, dropout, module.scaling)
    else:
        out = F.scaled_dot_product_attention(grouped, key, value, mask, dropout_p=dropout, scale=module.scaling)
    # A GPU's kernels write [B, rows, K, d] in memory, so this may be a copy.
    return out.reshape(batch, heads, rows, -1).transpose(1, 2)


def takes_named_kernels(query: torch.Tensor) -> bool:
    """Whether a kernel of torch's sdpa is called by its name, because sdpa itself might choose cuDNN.

    cuDNN makes a plan for each new shape, and each decode step has a new one: it took 55 to 68 ms a step on an H100
    with torch 2.11, where the kernels below need none.
    """
    return flash_takes(query, compute_dtype(query)) and sdpa_may_choose_cudnn()


@torch.compiler.assume_constant_result
def sdpa_may_choose_cudnn() -> bool:
    """Whether the caller turned off neither cuDNN nor the memory-efficient kernel."""
    return torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()


def flash_takes(query: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether torch's own flash-attention takes this query in this dtype: on NVIDIA GPUs, in half precision."""
    return (
        query.device.type == "cuda"
        and dtype in HALF
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= FLASH_HEAD_SIZE
        and gpu_has_flash(query.device.index)
    )


@torch.compiler.assume_constant_result
def gpu_has_flash(device_index: int) -> bool:
    """Whether this GPU and this torch have flash-attention, and the caller did not turn it off."""
    return (
        torch.version.hip is None
        and torch.backends.cuda.is_flash_attention_available()
        and torch.backends.cuda.flash_sdp_enabled()
        and torch.cuda.get_device_capability(device_index) >= (8, 0)
    )


def in_one_dtype(*states: torch.Tensor) -> list[torch.Tensor]:
    """Query, key and value in the dtype of the call, as sdpa has them under autocast; a cache may have another one."""
    dtype = compute_dtype(states[0])
    return [part.to(dtype) for part in states]


def flash_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, dropout: float, scaling: float
) -> torch.Tensor:
    """torch's flash-attention: query [B, H, T, d], key and value [B, K, S, d] -> [B, T, H, d]. If causal, T = S."""
    states = [part.transpose(1, 2) for part in (query, key, value)]
    lengths = query.shape[2], key.shape[2]
    kernel = torch.ops.aten._flash_attention_forward
    return kernel(*states, None, None, *lengths, dropout, causal, False, scale=scaling)[0]


def efficient_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    dropout: float,
    scaling: float,
) -> torch.Tensor:
    """torch's memory-efficient attention: query [B, H, T, d], key and value [B, H, S, d] -> [B, H, T, d].

    Args:
        mask: [B or 1, H or 1, T or 1, S], bool (True = visible) or additive.
    """
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, float("-inf"))
    length = key.shape[2]
    # The kernel reads several numbers at once, so each row of the mask begins at a multiple of 16.
    mask = F.pad(mask.to(query.dtype), (0, -length % 16))[..., :length]
    mask = mask.expand(*query.shape[:3], length)
    needs_lse = torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value))
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(query, key, value, mask, needs_lse, dropout, False, scale=scaling)[0]


def lower_triangle(query: torch.Tensor) -> torch.Tensor:
    """Causality as a mask, bool [1, 1, T, T]."""
    rows = query.shape[2]
    return torch.ones(rows, rows, dtype=torch.bool, device=query.device).tril()[None, None]


# The mask of self-attention


class SelfAttentionMask(NamedTuple):
    """The keys that are visible to each query of the self-attention layers.

    Attributes:
        mask: [B or 1, 1 or H, T or 1, S], bool (True = visible) or additive. It is complete: it also masks out later
            tokens, and each query has a visible key. For flash-attention bool [B, S], False at padding. None if
            `causal` and `texts` exclude all that has to be masked out.
        causal: whether the kernel masks out later tokens. Causality is never inferred from the mask.
        texts: for flash-attention on packed texts, their borders in the flattened batch, as keyword arguments of the
            kernel.
    """

    mask: Optional[torch.Tensor]
    causal: bool
    texts: Optional[dict] = None


def self_attention_mask(
    config: PretrainedConfig,
    attention_mask: Optional[torch.Tensor],
    hidden_states: torch.Tensor,
    cache: Optional[Cache],
    implementation: str,
    text_index: Optional[torch.Tensor] = None,
) -> tuple[SelfAttentionMask, str]:
    """The mask for the tokens hidden_states [B, T, D]. Each token sees the tokens of its text up to itself, without
    padding. Padding sees itself as well, so that no row of a softmax is empty.

    Args:
        attention_mask: [B, S], 0 at padding; None without padding (`MossVLModel` drops a mask of ones). Or a ready 4D
            mask, which replaces these rules: see `ready_mask`.
        text_index: [B, T], the text of each token, for packed rows.

    Returns:
        The mask, and the implementation to use: sdpa instead of flash-attention for masks that flash-attention lacks.
    """
    (batch, rows, _), past, device = hidden_states.shape, cached_length(cache), hidden_states.device
    length = past + rows
    slots = static_length(cache) if static_length(cache) is not None else length
    kind = attention_kind(implementation)
    without_flash = "sdpa" if kind == "flash" else implementation

    if attention_mask is not None and attention_mask.ndim == 4:
        check_ready_mask(attention_mask, config.num_attention_heads, batch, rows, cache)
        return SelfAttentionMask(ready_mask(attention_mask, hidden_states, past, slots), causal=False), without_flash

    assert text_index is None or past == 0, "packed rows come without a filled cache"
    if kind == "flash" and slots == length and flash_can_mask(attention_mask, text_index, past, rows):
        mask = None if attention_mask is None else attention_mask.to(device).bool()
        texts = None if text_index is None else text_borders(text_index.to(device))
        return SelfAttentionMask(mask, causal=True, texts=texts), implementation

    only_causal = attention_mask is None and text_index is None and slots == length
    if only_causal and (rows == 1 or past == 0):
        return SelfAttentionMask(None, causal=True), without_flash

    mask = complete_mask(attention_mask, text_index, past, rows, slots, device)
    return SelfAttentionMask(mask, causal=False), without_flash


def flash_can_mask(
    attention_mask: Optional[torch.Tensor], text_index: Optional[torch.Tensor], past: int, rows: int
) -> bool:
    """Whether flash-attention can mask this padding.

    It cannot mask padding in packed rows, and cannot compute a call of padding alone, which has no queries. A decode
    step of padded rows goes to sdpa: for flash-attention, transformers would copy all cached keys in each layer.
    """
    if attention_mask is None:
        return True
    return rows > 1 and text_index is None and bool(attention_mask[:, past:].any())


def complete_mask(
    attention_mask: Optional[torch.Tensor],
    text_index: Optional[torch.Tensor],
    past: int,
    rows: int,
    slots: int,
    device: torch.device,
) -> torch.Tensor:
    """Causality, texts and padding as one mask, bool [B or 1, 1, T, slots]. Empty slots of a static cache are masked
    out as later tokens."""
    length = past + rows
    columns = torch.arange(slots, device=device)
    diagonal = columns[past:length, None]  # the column of each row's own token
    mask = (columns <= diagonal)[None, None]
    if text_index is not None:
        texts = F.pad(text_index.to(device), (0, slots - length))
        mask = mask & (texts[:, None, :length, None] == texts[:, None, None, :])
    if attention_mask is not None:
        is_token = F.pad(attention_mask.to(device).bool(), (0, slots - length))
        mask = mask & is_token[:, None, None, :] | (columns == diagonal)
    return mask


def check_ready_mask(mask: torch.Tensor, heads: int, batch: int, rows: int, cache: Optional[Cache]) -> None:
    """Checks a ready 4D mask.

    Raises:
        ValueError: if its shape does not fit the rows of this call, or its dtype is neither bool nor float.
    """
    length, slots = cached_length(cache) + rows, static_length(cache)
    widths = (length,) if slots is None else (length, slots)
    fits = (
        mask.shape[0] in (1, batch)
        and mask.shape[1] in (1, heads)
        and mask.shape[2] in (1, rows)
        and mask.shape[3] in widths
    )
    if not fits:
        raise ValueError(
            f"`attention_mask` has shape {list(mask.shape)}; expected [{batch} or 1, {heads} or 1, {rows} or 1, "
            f"{' or '.join(map(str, widths))}]: the rows of this call by the tokens of the cache and of this call."
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(
            f"`attention_mask` has four axes and dtype {mask.dtype}; expected torch.bool (True = visible), or an "
            f"additive mask in float."
        )


def ready_mask(mask: torch.Tensor, hidden_states: torch.Tensor, past: int, slots: int) -> torch.Tensor:
    """A ready 4D mask [B or 1, 1 or H, T or 1, S] in the form that all kernels take: bool; or additive in the dtype of
    the scores, -inf where masked out. It is padded to the slots of the cache. A token that would see nothing sees
    itself, as padding does."""
    rows, device = hidden_states.shape[1], hidden_states.device
    mask = mask.to(device)
    visible = mask if mask.dtype == torch.bool else mask > MASKED
    empty_slots = slots - mask.shape[3]
    visible = F.pad(visible, (0, empty_slots))
    columns = torch.arange(slots, device=device)
    diagonal = columns[past : past + rows, None]
    visible = visible | (~visible.any(-1, keepdim=True) & (columns == diagonal))
    if mask.dtype == torch.bool:
        return visible
    bias = F.pad(mask.masked_fill(mask <= MASKED, 0), (0, empty_slots))
    return bias.to(compute_dtype(hidden_states)).masked_fill(~visible, float("-inf"))


def text_borders(text_index: torch.Tensor) -> dict:
    """The borders of packed texts in the flattened batch, as keyword arguments of transformers' flash-attention.

    Args:
        text_index: [B, T], the text of each token.
    """
    first = torch.ones_like(text_index, dtype=torch.bool)
    first[:, 1:] = text_index[:, 1:] != text_index[:, :-1]
    borders = F.pad(first.flatten().nonzero()[:, 0], (0, 1), value=first.numel()).to(torch.int32)
    longest = int(borders.diff().max())
    return {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": longest, "max_length_k": longest}
