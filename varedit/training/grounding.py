"""Auxiliary losses that teach a small editor what an instruction asks for, and of which part of the picture.

Not in the paper, whose model starts from a pretrained generator. Trained from zero, an editor finds the named object
last: until then the bits of an edited region say little about why they are wrong. The procedural world knows what lies
where, so the source tokens can be told directly; and it knows what is asked, so the text can be told too. The heads
exist in training only.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varedit.data.synthetic.grammar import name_of
from varedit.data.synthetic.phrases import PHRASES
from varedit.data.synthetic.scene import Item
from varedit.scales import ScaleSchedule
from varedit.transformer import VAREditTransformer

NOTHING = -1
TEMPERATURE = 0.07
MEANINGS = tuple(key for key in PHRASES if key != "recolour_sprite")
"""What a clause may ask for: the keys of its templates. A cut-out is recoloured in the same words as a shape."""
_COVER = 0.45  # half an object's size, less its rim: tokens beyond it show mostly background


def object_tokens(scene: dict[str, Any], grid: tuple[int, int]) -> Tensor:
    """Index of the object that each token of a grid lies on, long (h, w); `NOTHING` where there is none.

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
        near_y = (y - item["y"]).abs() * scene["height"] <= reach
        near_x = (x - item["x"]).abs() * scene["width"] <= reach
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


class Meaning(nn.Module):
    """Two linear heads on an editor's reading of the instruction: which of `MEANINGS` does it ask for?

    One reads the pooled text, which modulates all blocks, one the mean of what cross-attention looks up. The bits alone
    leave the two less orderly than the text encoder's states are: a linear probe tells wordings never trained on apart
    less often. What that does for the edits is in docs/model_card.md: little by itself.

    Args:
        editor: gives the widths; it is not kept.
    """

    def __init__(self, editor: VAREditTransformer) -> None:
        super().__init__()
        self.from_pooled = nn.Linear(editor.config.width, len(MEANINGS))
        self.from_words = nn.Linear(editor.config.width, len(MEANINGS))

    def forward(
        self, editor: VAREditTransformer, text_BTF: Tensor, mask_BT: Tensor, phrase_keys: Sequence[Sequence[str]]
    ) -> Tensor:
        """Cross-entropy of both heads together, mean over instructions, float32 scalar; of several clauses in one
        instruction each has the same share.

        Args:
            text_BTF, mask_BT: encoder states, right-padded, and True where there is text.
            phrase_keys: of each instruction, as in `Pair`.
        """
        wanted = torch.zeros(len(phrase_keys), len(MEANINGS))
        for row, keys in enumerate(phrase_keys):
            for key in keys:
                wanted[row, MEANINGS.index(key.removesuffix("_sprite"))] += 1 / len(keys)
        pooled_BD, words_BTD = editor.read_text(text_BTF, mask_BT)
        with torch.autocast(text_BTF.device.type, enabled=False):
            words_BD = (words_BTD.float() * mask_BT[..., None]).sum(1) / mask_BT.sum(1, keepdim=True)
            losses = [  # normalized: where pooled text is large, a head would learn slowly
                F.cross_entropy(head(F.rms_norm(read_BD, read_BD.shape[1:])), wanted.to(read_BD.device))
                for head, read_BD in ((self.from_pooled, pooled_BD), (self.from_words, words_BD))
            ]
        return losses[0] + losses[1]


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
