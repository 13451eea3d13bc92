"""A deeper transformer that goes on from a trained one."""

import copy

import torch
from torch import nn

from varedit.transformer import VAREditTransformer


@torch.no_grad()
def deepen(model: VAREditTransformer, num_blocks: int) -> VAREditTransformer:
    """The same transformer with more blocks, which computes the same until it is trained on.

    Copies of blocks come after their originals, evenly spread and, if there are fewer copies than blocks, none after
    the last. A copy's three branches begin at zero, so that nothing is unlearned, and its other weights need not be
    found anew (Wu et al., LLaMA Pro, 2024). Not in the paper.

    Args:
        num_blocks: of the new model, at least the old one's.

    Returns:
        A new model that shares no weights with the old one; devices and dtypes are kept.

    Raises:
        ValueError: if `num_blocks` is less than the model has.
    """
    old = len(model.blocks)
    if num_blocks < old:
        raise ValueError(f"num_blocks is {num_blocks}, the model has {old}; a model can only be made deeper")
    copies = num_blocks - old
    copied = [-(-number * old // (copies + 1)) - 1 for number in range(1, copies + 1)]  # rounded up
    deeper = copy.deepcopy(model)
    blocks: list[nn.Module] = []
    for origin in range(old):
        blocks.append(deeper.blocks[origin])
        for _ in range(copied.count(origin)):
            block = copy.deepcopy(model.blocks[origin])
            for branch in (block.self_attention.proj, block.cross_attention.proj, block.mlp.fc2):
                nn.init.zeros_(branch.weight)
                nn.init.zeros_(branch.bias)
            blocks.append(block)
    deeper.blocks = nn.ModuleList(blocks)
    deeper.register_to_config(num_blocks=num_blocks)
    return deeper
