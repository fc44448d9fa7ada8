"""Attention kernels, called alike for vision, self- and cross-attention; which names are allowed; what self-attention hides.

Axes: B text rows (or frames), T rows of a call, S tokens in all (cache included), H query heads, K key/value heads, G = H / K, d head size.
"""

import inspect
import re
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from .cache_layers import cached_length, static_length


logger = logging.get_logger(__name__)

HALF = (torch.float16, torch.bfloat16)
CPU_BFLOAT16 = getattr(
    torch.cpu, "_is_avx512_bf16_supported", lambda: False
)()  # whether this CPU has products in bfloat16
CPU_SCORES = 1 << 22  # attention scores that are there at once on a CPU where they are written out
HIDDEN = torch.finfo(
    torch.float16
).min  # additive masks hide by this or less: the lowest number of some dtype, or -inf


# Kernels


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0):
    """Softmax attention written out. query [B, H, T, d], key and value [B, K, S, d], mask bool (True = may see) or additive,
    [B or 1, 1, T or 1, S]. Query heads of one group are rows of one product, so keys and values are not repeated.

    Returns:
        [B, T, H, d] and the weights [B, H, T, S].
    """
    (batch, heads, rows, d), kv_heads = query.shape, key.shape[1]
    grouped = (query * scaling).reshape(batch, kv_heads, -1, d)  # [B, K, G * T, d]; scaled before the larger product
    scores = (grouped @ key.transpose(2, 3)).view(batch, heads, rows, -1)
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, float("-inf"))
        else:
            scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1)  # computed in float32 whatever the dtype, rounded at the end
    dropped = F.dropout(weights, p=dropout, training=module.training)
    out = dropped.view(batch, kv_heads, -1, key.shape[2]) @ value
    return out.view(batch, heads, rows, -1).transpose(1, 2), weights


def blockwise_attention_forward(module, query, key, value, attention_mask, scaling, causal=False):
    """`eager_attention_forward` block by block, so that at most `CPU_SCORES` scores are there at once (or a row's); without weights."""
    (batch, heads, rows, d), length = query.shape, key.shape[2]
    rows_a_block = min(rows, max(1, CPU_SCORES // (heads * length)))
    samples = max(1, CPU_SCORES // (heads * length * rows))
    out = query.new_empty(batch, rows, heads, d)
    for sample in range(0, batch, samples):
        own = slice(sample, sample + samples)
        for first in range(0, rows, rows_a_block):
            part = slice(first, min(first + rows_a_block, rows))
            seen, mask = slice(0, part.stop if causal else length), attention_mask
            if causal:
                mask = torch.ones(part.stop - first, part.stop, dtype=torch.bool, device=query.device).tril(first)[
                    None, None
                ]
            elif mask is not None:
                mask = mask.expand(batch, -1, rows, -1)[own, :, part]
            out[own, part], _ = eager_attention_forward(
                module, query[own, :, part], key[own, :, seen], value[own, :, seen], mask, scaling
            )
    return out


ALLOWED_NAMES = (
    "'eager', 'sdpa', 'flash_attention_2', 'flash_attention_3', 'flash_attention_4', a flash-attention kernel of the `kernels` package "
    "('owner/name'), or a function that you registered with the contract of transformers' sdpa (a mask [B, 1, T, S], or None and "
    "`is_causal`)"
)


def attention_kind(name: str) -> str:
    """How the attention function of this name is called; the one place that decides which names are allowed.

    Returns:
        "eager"; "sdpa", transformers' own; "flash", which takes padding as [B, S] and hides later tokens itself; "function", one that
        a user registered, which is called like sdpa.

    Raises:
        ValueError: for a name that is unknown, or whose function has another contract (paged, flex: they take no `is_causal`, need
            masks of their own, or add a bool mask to the scores).
    """
    if name == "eager":
        return "eager"
    known = isinstance(name, str)
    function = ALL_ATTENTION_FUNCTIONS.get(name) if known else None
    while isinstance(function, partial):
        function = function.func
    if function is sdpa_attention_forward:
        return "sdpa"
    if function is flash_attention_forward or (known and re.fullmatch(r"flash_attention_[234]", name)):
        return "flash"
    if known and function is None and is_kernel_name(name):
        raise ValueError(
            f"The attention kernel {name!r} is not loaded; expected `attn_implementation=` or `set_attn_implementation`, which load it."
        )
    of_user = function is not None and not name.startswith("paged|") and "/" not in name
    if of_user and not getattr(function, "__module__", "").startswith("transformers."):
        make_mask = ALL_MASK_ATTENTION_FUNCTIONS.get(name)  # what transformers' own models would make its masks by
        if make_mask is None or make_mask is ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]:
            return "function"
    raise ValueError(f"The attention implementation {name!r} cannot be used by MOSS-VL; expected {ALLOWED_NAMES}.")


@lru_cache
def takes_causality(function) -> bool:
    """Whether a user's function names `is_causal` among its parameters; one that does not has to be told by a mask."""
    return "is_causal" in inspect.signature(function).parameters


def is_kernel_name(name: str) -> bool:
    """Whether a name is that of a kernel of the `kernels` package, whose function is known once it is loaded."""
    return "/" in name and not name.startswith("paged|")


def check_implementations(config) -> None:
    """Refuses what stands in a config by assignment, past `attn_implementation` and `set_attn_implementation`, before anything is computed.

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


def compute_dtype(states: torch.Tensor) -> torch.dtype:
    """The dtype in which matrix products of these states run: that of autocast if it is on."""
    device = states.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return states.dtype


def flash_can_run(device: str, dtype: torch.dtype) -> bool:
    """Whether the flash-attention kernels run on a type of device in a dtype."""
    return device != "cpu" and dtype in HALF


def usable_implementation(name: Optional[str], states: torch.Tensor, need_weights: bool = False) -> str:
    """The attention implementation for this call: eager if weights are asked for, sdpa if flash-attention cannot run.

    Raises:
        ValueError: for names that are not allowed, see `attention_kind`.
    """
    name = "sdpa" if name is None else name
    kind = attention_kind(name)
    if need_weights:
        return "eager"
    if kind == "flash" and not flash_can_run(states.device.type, compute_dtype(states)):
        logger.warning_once(
            f"{name} does not run on {states.device.type} in {compute_dtype(states)}; sdpa is used. Load the model in bfloat16 on CUDA."
        )
        return "sdpa"
    return name


def lower_triangle(rows: int, device) -> torch.Tensor:
    """Causality as a mask, bool [1, 1, rows, rows]."""
    return torch.ones(rows, rows, dtype=torch.bool, device=device).tril()[None, None]


def attend(module, query, key, value, mask, implementation, *, causal=False, dropout=0.0, texts=None):
    """One attention call. Shapes as in `eager_attention_forward`.

    Args:
        mask: None; or [B or 1, 1 or H, T or 1, S], bool (True = may see) or additive; for flash-attention bool [B, S], False at padding.
        causal: whether the kernel itself hides later tokens. With a mask of four axes it does not: then the mask says all. Without a
            mask T = S, or for flash-attention T <= S, the rows being the last ones.
        texts: for flash-attention, what tells it the texts of packed rows; see `SelfAttentionMask`.

    Returns:
        [B, T, H, d], and the weights if the implementation is eager, else None.
    """
    scaling, dropout = module.scaling, dropout if module.training else 0.0
    (batch, heads, rows, d), kv_heads = query.shape, key.shape[1]
    causal, kind = causal and rows > 1, attention_kind(implementation)
    if kind == "eager":
        mask = lower_triangle(rows, query.device) if causal else mask
        return eager_attention_forward(module, query, key, value, mask, scaling, dropout)
    attention = ALL_ATTENTION_FUNCTIONS.get(implementation)
    if kind == "function" and causal and not takes_causality(attention):
        mask, causal = lower_triangle(rows, query.device), False
    if kind == "flash":
        if attention is None:
            raise ValueError(
                f"This transformers does not know {implementation!r}; expected another version of flash-attention, or sdpa."
            )
        dtype = compute_dtype(value)  # keys of a cache may be in another
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        if module.config._attn_implementation != implementation:
            # transformers loads the kernel whose name the module's config says, which for cross-attention may be that of another.
            config = SimpleNamespace(_attn_implementation=implementation)
            module = SimpleNamespace(config=config, is_causal=module.is_causal, modules=module.modules)
        out, _ = attention(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=causal, **(texts or {})
        )
        return out, None
    inference = not (torch.is_grad_enabled() or dropout)
    if (
        kind == "sdpa"
        and inference
        and query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and CPU_BFLOAT16
        and (rows > 1 or key.is_contiguous())
    ):
        # torch's own kernel is no faster there in bfloat16 than in float32; two products and a softmax are.
        return blockwise_attention_forward(module, query, key, value, mask, scaling, causal), None
    groups = heads // kv_heads
    of_heads = mask is not None and mask.shape[1] > 1
    tiled = (
        mask is not None and rows > 1 and not (causal or of_heads) and mask.numel() * groups <= key.numel()
    )  # less to copy than the keys
    if kind == "sdpa" and groups > 1 and (rows == 1 or tiled or (mask is None and not causal)):
        # Nothing tells the heads of a group apart but their queries: as rows of one head they read the keys once.
        grouped = query.reshape(batch, kv_heads, -1, d)
        if tiled:
            mask = mask.expand(-1, -1, rows, -1).repeat(1, 1, groups, 1)
        elif of_heads:
            mask = mask.reshape(len(mask), kv_heads, groups, -1)
        out = F.scaled_dot_product_attention(grouped, key, value, mask, dropout_p=dropout, scale=scaling)
        return out.view(batch, heads, rows, -1).transpose(1, 2), None
    out, _ = attention(module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=causal)
    return out, None


# What self-attention hides


class SelfAttentionMask(NamedTuple):
    """What the rows of the self-attention layers see.

    Attributes:
        mask: [B or 1, 1 or H, T or 1, S], bool (True = may see) or additive, in which every row sees a token; for flash-attention bool
            [B, S], False at padding; None if `causal` and `texts` say all.
        causal: whether the kernel has to hide later tokens itself; never told from the mask.
        texts: for flash-attention and packed rows, the borders of the texts in the flattened batch, by the names that transformers has
            for them.
    """

    mask: Optional[torch.Tensor]
    causal: bool
    texts: Optional[dict] = None


def self_attention_mask(
    config,
    attention_mask: Optional[torch.Tensor],
    hidden_states: torch.Tensor,
    cache: Optional[Cache],
    implementation: str,
    text_index: Optional[torch.Tensor] = None,
) -> tuple[SelfAttentionMask, str]:
    """What the rows hidden_states [B, T, D] see: the tokens up to their own, of their own text, that are no padding. A padding token sees
    itself as well, so that no row of a softmax is empty.

    Args:
        attention_mask: [B, S], 0 at padding; or a ready mask that says all, also what is later: see `ready_mask`.
        text_index: [B, T], the text of each token, in packed rows.

    Returns:
        That, and the implementation for it: sdpa in place of flash-attention for what flash-attention cannot hide (a ready mask, the empty
        slots of a static cache, padding beside packed texts, a call of padding alone), and for one token per padded row, for which
        transformers would copy the keys and values of the whole cache at each layer.
    """
    (batch, rows, _), past, device = hidden_states.shape, cached_length(cache), hidden_states.device
    known = past + rows
    slots = static_length(cache) if static_length(cache) is not None else known
    kind = attention_kind(implementation)
    without_flash = "sdpa" if kind == "flash" else implementation
    if attention_mask is not None and attention_mask.ndim == 4:
        check_ready_mask(attention_mask, config.num_attention_heads, batch, rows, cache)
        return SelfAttentionMask(ready_mask(attention_mask, hidden_states, past, slots), causal=False), without_flash
    assert text_index is None or past == 0, "packed rows come without a filled cache"
    padded = attention_mask is not None  # not asked of the device again: `MossVLModel` drops a mask of ones
    by_flash = kind == "flash" and slots == known and not (padded and (rows == 1 or text_index is not None))
    if by_flash and not (padded and not bool(attention_mask[:, past:].any())):  # not without any query
        mask = attention_mask.to(device).bool() if padded else None
        texts = None if text_index is None else text_borders(text_index.to(device))
        return SelfAttentionMask(mask, causal=True, texts=texts), implementation
    if not padded and slots == known and text_index is None and (rows == 1 or past == 0):
        return SelfAttentionMask(None, causal=True), without_flash
    at = torch.arange(slots, device=device)
    row_at = at[past:known, None]
    mask = (at <= row_at)[None, None]  # [1, 1, T, S]
    if text_index is not None:
        texts = F.pad(text_index.to(device), (0, slots - known))
        mask = mask & (texts[:, None, :known, None] == texts[:, None, None, :])
    if padded:
        may_see = F.pad(attention_mask.to(device).bool(), (0, slots - known))
        mask = mask & may_see[:, None, None, :] | (at == row_at)
    return SelfAttentionMask(mask, causal=False), without_flash


def check_ready_mask(mask: torch.Tensor, heads: int, batch: int, rows: int, cache: Optional[Cache]) -> None:
    """Refuses a caller's mask of four axes that does not fit the rows of this call, or whose dtype says nothing.

    Raises:
        ValueError: what does not fit.
    """
    known, slots = cached_length(cache) + rows, static_length(cache)
    widths = (known,) if slots is None else (known, slots)
    fits = (
        mask.shape[0] in (1, batch)
        and mask.shape[1] in (1, heads)
        and mask.shape[2] in (1, rows)
        and mask.shape[3] in widths
    )
    if not fits:
        raise ValueError(
            f"`attention_mask` has shape {list(mask.shape)}; expected [{batch} or 1, {heads} or 1, {rows} or 1, {' or '.join(map(str, widths))}]: "
            f"the rows of this call by the tokens of the cache and of this call."
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(
            f"`attention_mask` has four axes and dtype {mask.dtype}; expected torch.bool (True = may see), or additive in float."
        )


def ready_mask(mask: torch.Tensor, hidden_states: torch.Tensor, past: int, slots: int) -> torch.Tensor:
    """A caller's mask [B or 1, 1 or H, T or 1, S] as every kernel takes it: bool, or additive in the dtype of the scores with -inf where
    it hides; S as long as the cache. A row that would see nothing sees its own token, as a padding token does."""
    rows, device = hidden_states.shape[1], hidden_states.device
    mask = mask.to(device)
    sees = mask if mask.dtype == torch.bool else mask > HIDDEN
    at = torch.arange(slots, device=device)
    more = slots - mask.shape[3]
    sees = F.pad(sees, (0, more))
    sees = sees | (~sees.any(-1, keepdim=True) & (at == at[past : past + rows, None]))
    if mask.dtype == torch.bool:
        return sees
    added = F.pad(mask.masked_fill(mask <= HIDDEN, 0), (0, more))
    return added.to(compute_dtype(hidden_states)).masked_fill(~sees, float("-inf"))


def text_borders(text_index: torch.Tensor) -> dict:
    """Borders of the texts of packed rows [B, T] in the flattened batch, as transformers hands them to flash-attention."""
    first = torch.ones_like(text_index, dtype=torch.bool)
    first[:, 1:] = text_index[:, 1:] != text_index[:, :-1]
    borders = F.pad(first.flatten().nonzero()[:, 0], (0, 1), value=first.numel()).to(torch.int32)
    longest = int(borders.diff().max())
    return {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": longest, "max_length_k": longest}
