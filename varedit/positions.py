"""Where tokens lie: positions of source and target tokens on one reference grid, and their rotary angles.

S source tokens, L target tokens, N heads, E head size.
"""

import torch
from torch import Tensor

from varedit.scales import Grid, ScaleSchedule

POSITION_LAYOUTS = ("offset", "fixed_offset", "released")

FIXED_OFFSET = (64, 64)
"""Keeps source and target apart at every template: one side of a reference grid is always at most 64."""

Rotary = tuple[Tensor, Tensor]


def ladder_positions(grids: tuple[Grid, ...], reference: Grid) -> Tensor:
    """Row and column of every token of a ladder, counted on the reference grid: int64 (tokens, 2)."""
    rows = []
    for h, w in grids:
        row = torch.round(torch.arange(h) * (reference[0] / h))
        column = torch.round(torch.arange(w) * (reference[1] / w))
        rows.append(torch.cartesian_prod(row, column).long().view(-1, 2))
    return torch.cat(rows)


def source_grids(schedule: ScaleSchedule, conditioning: str, at_1024: bool = False) -> tuple[Grid, ...]:
    """Grids of the source tokens, in the order they are laid out.

    Under full conditioning the ladder is laid out finest first, so that the source scales a target scale may see lie
    next to the targets in the cache.
    """
    grids = schedule.reference_grids if at_1024 else schedule.grids
    return tuple(reversed(grids)) if conditioning == "full" else grids[-1:]


def token_positions(schedule: ScaleSchedule, conditioning: str, layout: str) -> tuple[Tensor, Tensor]:
    """Positions of source and target tokens, int64 (S, 2) and (L, 2).

    Positions are counted on the finest grid (H, W) of the 1024 class at every size, (64, 64) when square.

    - "offset" is the paper's layout (section 3.2): the source is shifted by (H, W).
    - "fixed_offset" shifts the source by (64, 64) at every aspect template, so that "the same place in the source" is
      the same rotation whatever the aspect; with "offset" a model of several aspects has to tell them apart first.
      Both are the same for square images, the only ones the paper has.
    - "released" reproduces the released code: one table of the 1024 class, read from its first row with the token
      counts in use, so that below 1024 both parts fall on a raster walk through the source part. It agrees with
      "offset" at 1024.
    """
    reference = schedule.reference_grids[-1]
    shift = torch.tensor(FIXED_OFFSET if layout == "fixed_offset" else reference)
    if layout != "released":
        source = ladder_positions(source_grids(schedule, conditioning), reference) + shift
        return source, ladder_positions(schedule.grids, reference)
    table = torch.cat(
        [
            ladder_positions(source_grids(schedule, conditioning, at_1024=True), reference) + shift,
            ladder_positions(schedule.reference_grids, reference),
        ]
    )
    num_source = sum(h * w for h, w in source_grids(schedule, conditioning))
    return table[:num_source], table[num_source : num_source + schedule.offsets[-1]]


def rotary_table(positions: Tensor, head_size: int, device: torch.device) -> Rotary:
    """Cosines and sines, float32 (tokens, head_size / 2). The first half of the pairs turns with the row."""
    quarter = head_size // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float32) / quarter)
    angles = (positions[:, :, None].float() * frequencies).flatten(1).to(device)
    return angles.cos(), angles.sin()


def rotate(x_BNlE: Tensor, rotary: Rotary) -> Tensor:
    """Turn interleaved channel pairs (2i, 2i + 1) by each token's angles. Computes and returns float32."""
    cos, sin = rotary
    even, odd = x_BNlE.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
