"""The text layers of static caches, whose keys and values keep their addresses and shapes.

Axes: B rows, K key/value heads, C slots, d head size.
"""

from collections.abc import Sequence
from typing import Optional

import torch
from transformers.cache_utils import StaticLayer


class StaticTextLayer(StaticLayer):
    """A static layer of transformers that counts its tokens on the host, so that the host never waits for the device.
    Its buffers [B, K, C, d] of C slots keep their addresses, as CUDA graphs need."""

    def __init__(self, max_cache_len: int):
        super().__init__(max_cache_len=max_cache_len)
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: Optional[torch.Tensor] = None) -> None:
        shape = (*key_states.shape[:2], self.max_cache_len, key_states.shape[-1])
        self.keys, self.values = (static_zeros(key_states, shape) for _ in range(2))
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states)
        first, self.length = self.length, self.length + key_states.shape[-2]
        self.keys[:, :, first : self.length] = key_states
        self.values[:, :, first : self.length] = value_states
        return self.keys, self.values

    def with_token(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All slots [B, K, C, d] of keys and values, the next of which is yet to be written."""
        return self.keys, self.values

    def take_token(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Counts the token that was written into the next slot."""
        self.length += 1

    def get_seq_length(self, *args) -> int:
        return self.length

    def crop(self, count: int) -> None:
        """Removes the last -`count` tokens; a positive `count` is the number of tokens that stay."""
        self.length = min(self.length, count) if count > 0 else max(0, self.length + count)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if self.is_initialized:
            for part in (self.keys, self.values):
                part.copy_(part.index_select(0, beam_idx.to(part.device)))

    def reset(self) -> None:
        super().reset()
        self.length = 0


def static_zeros(like: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Zeros at an address on which CUDA graphs may rely. A compiled step takes those of another cache without a new
    compilation."""
    zeros = torch.zeros(shape, dtype=like.dtype, device=like.device)
    torch._dynamo.mark_static_address(zeros, guard=False)
    return zeros
