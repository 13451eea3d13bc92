"""Auxiliary losses that teach a small editor which part of the picture an instruction means.

Not in the paper, whose model starts from a pretrained generator. Trained from zero, an editor finds the named object
last: until then the bits of an edited region say little about why they are wrong. The procedural world knows what lies
where, so the source tokens can be told directly. Both heads exist in training only.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varedit.data.synthetic.grammar import name_of
from varedit.data.synthetic.scene import Item
from varedit.scales import ScaleSchedule
from varedit.transformer import VAREditTransformer

NOTHING = -1
TEMPERATURE = 0.07
_COVER = 0.45  # half an object's size, less its rim: tokens beyond it show mostly background
_HEIGHTS = {"sign": 0.42, "rectangle": 0.56, "oval": 0.6, "arrow": 0.84}
"""Height over width of what is not about square; of a cut-out it is not known here."""


def object_tokens(scene: dict[str, Any], grid: tuple[int, int]) -> Tensor:
    """Index of the object that each token of a grid lies on, about, long (h, w); `NOTHING` where there is none.

    Args:
        scene: scene graph of a procedural pair (`Pair.scene`).
    """
    h, w = grid
    short = min(scene["height"], scene["width"])
    y = ((torch.arange(h) + 0.5) / h)[:, None]
    x = ((torch.arange(w) + 0.5) / w)[None]
    owner = torch.full(grid, NOTHING)
    for index, item in enumerate(scene["objects"]):
        reach = _COVER * item["size"] * short
        high, wide = reach * (1.0 if item["kind"] == "sprite" else _HEIGHTS.get(item["name"], 1.0)), reach
        if item.get("angle", 0) % 180 == 90:
            high, wide = wide, high
        near_y = (y - item["y"]).abs() * scene["height"] <= high
        near_x = (x - item["x"]).abs() * scene["width"] <= wide
        owner[near_y & near_x] = index
    return owner


class Grounding(nn.Module):
    """Two linear heads on the source tokens of an editor: what lies here, and is it to change?

    The names are read where the tokens ask for words the second time, so that a token and the word for it lie close
    together when they meet; the change mask two blocks later, once they have met.

    Args:
        editor: read by forward hooks from now on.
        name_block, mask_block: at whose cross-attention the source tokens are read.
    """

    def __init__(self, editor: VAREditTransformer, name_block: int = 1, mask_block: int = 3) -> None:
        super().__init__()
        config = editor.config
        if not 0 <= name_block <= mask_block < config.num_blocks - 1:
            raise ValueError(
                f"blocks {name_block} and {mask_block}: give two of 0 to {config.num_blocks - 2}, the names' first "
                "(the last block keeps no source)"
            )
        self.to_name = nn.Linear(config.width, config.text_features)
        self.to_mask = nn.Linear(config.width, 1)
        self._read: dict[str, Tensor] = {}
        for key, block in (("name", name_block), ("mask", mask_block)):
            editor.blocks[block].cross_norm.register_forward_hook(
                lambda _module, _inputs, output, key=key: self._read.__setitem__(key, output)
            )

    def forward(
        self, schedule: ScaleSchedule, name_BS: Tensor, names_PF: Tensor, mask_BHW: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Losses of the editor's last forward pass over all scales.

        Args:
            name_BS: long, row of `names_PF` that says what lies on each source token, or `NOTHING`.
            names_PF: one embedding a phrase, float32.
            mask_BHW: bool, where the edit may change pixels.

        Returns:
            The names' loss: cross-entropy over the batch's phrases by cosine similarity, mean over tokens on objects
            (0 if there are none). The mask's: binary cross-entropy, mean over tokens; a token that the mask touches
            counts as inside. Both float32 scalars.
        """
        num_source = schedule.num_tokens[-1]
        with torch.autocast(names_PF.device.type, enabled=False):
            name_BSD, mask_BSD = (self._read.pop(key)[:, :num_source].float() for key in ("name", "mask"))
            found = name_BS != NOTHING
            predicted = F.normalize(self.to_name(name_BSD[found]), dim=-1)
            logits = predicted @ F.normalize(names_PF, dim=-1).T / TEMPERATURE
            name_loss = F.cross_entropy(logits, name_BS[found], reduction="sum") / found.sum().clamp(min=1)
            inside = F.adaptive_max_pool2d(mask_BHW.float()[:, None], schedule.finest).flatten(1)
            mask_loss = F.binary_cross_entropy_with_logits(self.to_mask(mask_BSD)[..., 0], inside)
        return name_loss, mask_loss


def phrase_rows(scenes: Sequence[dict[str, Any]], grid: tuple[int, int]) -> tuple[list[str], Tensor]:
    """What lies on each source token of a batch, in words.

    Args:
        scenes: scene graphs of procedural pairs. grid: the source tokens'.

    Returns:
        The batch's distinct phrases ("red ball", "dog"), and long (B, S) rows into them, `NOTHING` between objects.
    """
    rows: dict[str, int] = {}
    owners = []
    for scene in scenes:
        phrases = [name_of(Item(**item)) for item in scene["objects"]]
        table = torch.tensor([*(rows.setdefault(phrase, len(rows)) for phrase in phrases), NOTHING])
        owners.append(table[object_tokens(scene, grid).flatten()])
    return list(rows), torch.stack(owners)


def phrase_embeddings(states: Sequence[Tensor]) -> Tensor:
    """One embedding a phrase, float32 (P, F): the mean of its token states without the two end tokens.

    Args:
        states: (T, F) each, as of `varedit.text.encode_prompts`; at least one.
    """
    return torch.stack([state[1:-1].float().mean(0) for state in states])
