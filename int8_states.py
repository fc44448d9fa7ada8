"""Keys or values in 8 bits, with one scale per token and head.

Axes: K key/value heads, V vision tokens, d head size.
"""

from typing import NamedTuple, Optional

import torch


LEVELS = 127  # largest stored number
SCALE_DTYPE = torch.bfloat16  # exact in every dtype that states are read in


class Int8States(NamedTuple):
    """States [1, K, V, d] as numbers -127..127 times a scale.

    Attributes:
        numbers: int8 [1, K, V, d].
        scales: bfloat16 [1, K, V, 1], the largest absolute value of a token and head divided by 127.
    """

    numbers: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def empty(cls, shape: tuple[int, ...], device: torch.device) -> "Int8States":
        numbers = torch.empty(shape, dtype=torch.int8, device=device)
        return cls(numbers, torch.empty(*shape[:-1], 1, dtype=SCALE_DTYPE, device=device))

    @classmethod
    def of(cls, states: torch.Tensor) -> "Int8States":
        """Quantizes states. The error is at most half a scale, or one at the largest value of a token and head."""
        largest = states.abs().amax(-1, keepdim=True).float()
        scales = (largest / LEVELS).to(SCALE_DTYPE)
        divisors = scales.float().clamp_(min=torch.finfo(SCALE_DTYPE).tiny)
        return cls((states / divisors).round_().clamp_(-LEVELS, LEVELS).to(torch.int8), scales)

    def write(self, tokens: slice, states: torch.Tensor) -> None:
        """Quantizes states [1, K, tokens, d] into these tokens."""
        for own, part in zip(self, Int8States.of(states), strict=True):
            own[:, :, tokens] = part

    def read(self, tokens: slice, dtype: torch.dtype) -> torch.Tensor:
        """The states of these tokens in a dtype, [1, K, tokens, d]."""
        return self.numbers[:, :, tokens].to(dtype).mul_(self.scales[:, :, tokens].to(dtype))


def is_int8(name: Optional[str]) -> bool:
    """Whether a `vision_cache_dtype` means 8 bits.

    Raises:
        ValueError: unless it is None or "int8".
    """
    if name not in (None, "int8"):
        raise ValueError(
            f"`vision_cache_dtype` is {name!r}; expected 'int8', or None to keep keys and values of vision tokens in "
            "the dtype of the model."
        )
    return name is not None


def dtype_of_settings(generation_config) -> Optional[str]:
    """The `vision_cache_dtype` that a generation config means: "int8" with a quantized cache of 8 bits, else None.

    Released checkpoints have `cache_implementation` "quantized" and a `cache_config` with `nbits` 8 in
    generation_config.json, and keep their vision tokens in 8 bits as well.
    """
    if getattr(generation_config, "cache_implementation", None) != "quantized":
        return None
    return "int8" if (generation_config.cache_config or {}).get("nbits") == 8 else None
