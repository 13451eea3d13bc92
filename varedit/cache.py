"""Keys and values kept while an edit is generated scale by scale."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class KeyValueCache:
    """Preallocated keys and values of every block, laid out [source | target] along the token axis.

    The source part is written right-aligned against the targets, coarsest needed part last, so that what a scale may
    see is always one contiguous view: [the last `num_source` source tokens | targets so far]. Attention does not care
    about the order of keys.

    N heads, E head size, S source tokens, L target tokens, T text tokens.

    Attributes:
        num_source: S, length of the source part.
        keys, values: one tensor a block, (B, N, S + L, E).
        source_keys, source_values: per block with scale-aligned reference, one tensor a scale (B, N, n_k, E):
            the source pooled to that scale.
        text_keys, text_values: one tensor a block, (B, N, T, E).
        text_mask_BT: bool (B, T), True where there is text.
        pooled_text_BD: float32 (B, D), pooled instruction: start token and head.
        shared_B6D: float32 (B, 6, D), the modulation shared by the blocks.
        rotary: cosines and sines of the target positions, (L, E / 2) each.
    """

    num_source: int
    text_mask_BT: Tensor
    pooled_text_BD: Tensor
    shared_B6D: Tensor
    rotary: tuple[Tensor, Tensor]
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    source_keys: dict[int, list[Tensor]] = field(default_factory=dict)
    source_values: dict[int, list[Tensor]] = field(default_factory=dict)
    text_keys: list[Tensor] = field(default_factory=list)
    text_values: list[Tensor] = field(default_factory=list)

    def add_block(self, keys_BNSE: Tensor, values_BNSE: Tensor, num_targets: int) -> None:
        """Allocate one block's arena and write its source part."""
        for arena, part in ((self.keys, keys_BNSE), (self.values, values_BNSE)):
            batch_size, num_heads, num_source, head_size = part.shape
            tensor = torch.empty(
                batch_size, num_heads, num_source + num_targets, head_size, dtype=part.dtype, device=part.device
            )
            tensor[:, :, :num_source] = part
            arena.append(tensor)

    def add_aligned_source(self, block: int, keys: list[Tensor], values: list[Tensor]) -> None:
        """Keep the source pooled to every scale for a block with scale-aligned reference."""
        self.source_keys[block], self.source_values[block] = keys, values

    def append(
        self, block: int, scale: int, keys_BNlE: Tensor, values_BNlE: Tensor, start: int, num_visible: int
    ) -> tuple[Tensor, Tensor]:
        """Write the keys and values of one scale and return what its queries see.

        Args:
            start: offset of the scale among the targets.
            num_visible: source tokens that the scale may see (the last ones of the source part).

        Returns:
            Keys and values (B, N, num_visible + start + l, E), contiguous views along the token axis.
        """
        begin, end = self.num_source + start, self.num_source + start + keys_BNlE.shape[2]
        first = self.num_source - num_visible
        if block in self.source_keys:
            self.keys[block][:, :, first : self.num_source] = self.source_keys[block][scale]
            self.values[block][:, :, first : self.num_source] = self.source_values[block][scale]
        self.keys[block][:, :, begin:end] = keys_BNlE
        self.values[block][:, :, begin:end] = values_BNlE
        return self.keys[block][:, :, first:end], self.values[block][:, :, first:end]
