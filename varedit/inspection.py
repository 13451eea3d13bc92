"""Where a model looks while it edits: attention maps by block and scale (paper section 3.2 and appendix A.7).

The transformer knows nothing of this. Hooks note what enters the self-attention of the chosen blocks during an ordinary
edit; queries and keys are computed from that once more afterwards, by the blocks' own projections.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from textwrap import shorten

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from varedit.image_processor import Fit, ImageInput, prepare, to_pil
from varedit.pipeline import VAREditPipeline
from varedit.positions import rotary_table, source_grids, token_positions
from varedit.scales import Grid, ScaleSchedule
from varedit.transformer import SelfAttention, VAREditTransformer, scale_aligned_reference


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """What the tokens of one scale look at in one block, the mean over the heads.

    Attributes:
        block, scale: of the queries.
        schedule: of the edit.
        grids: of the source tokens, in the order of the keys.
        weights_lK: float32 (l, K), every row sums to 1. Keys: [source | targets of the scales so far].
    """

    block: int
    scale: int
    schedule: ScaleSchedule
    grids: tuple[Grid, ...]
    weights_lK: Tensor

    @property
    def num_source(self) -> int:
        return sum(h * w for h, w in self.grids)

    @property
    def shares(self) -> tuple[float, float, float]:
        """How much of the attention goes to the source, to earlier scales of the target, and to the own scale."""
        num_own = self.weights_lK.shape[0]
        own = self.weights_lK[:, -num_own:].sum(1).mean().item()
        source = self.weights_lK[:, : self.num_source].sum(1).mean().item()
        return source, max(0.0, 1 - source - own), own

    @property
    def source_map(self) -> Tensor:
        """Attention to each place of the source, mean over the queries: (h, w) on the finest grid, sum 1."""
        height, width = self.schedule.finest
        total = torch.zeros(height, width)
        for part, (h, w) in zip(self.weights_lK[:, : self.num_source].mean(0).split(self._counts), self.grids):
            spread = F.interpolate(part.view(1, 1, h, w), size=(height, width), mode="bilinear", align_corners=False)
            total += spread[0, 0] * part.sum() / spread.sum()
        return total / total.sum()

    @cached_property
    def distance(self) -> float | None:
        """How far from its own place a token looks in the source, relative to a look everywhere alike.

        0: at its own place only. 1: as far as attention that is uniform over the source. None where the source is a
        single token.
        """
        if self.num_source == 1:
            return None
        queries = _centres(self.schedule.grids[self.scale])
        far_lS = torch.cdist(queries, torch.cat([_centres(grid) for grid in self.grids]))
        weights_lS = self.weights_lK[:, : self.num_source]
        mean = (weights_lS * far_lS).sum() / weights_lS.sum()
        # Uniform over the picture, not over the tokens: coarse scales would count more in a ladder.
        area_S = torch.cat([torch.full((count,), 1 / count) for count in self._counts]) / len(self.grids)
        return (mean / (far_lS * area_S).sum(1).mean()).item()

    @property
    def _counts(self) -> list[int]:
        return [h * w for h, w in self.grids]


def _centres(grid: Grid) -> Tensor:
    """Centres of the cells of a grid in shares of the picture's height and width, (tokens, 2)."""
    h, w = grid
    return torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w).view(-1, 2)


@dataclass(frozen=True, eq=False)
class Inspection:
    """An edit and its attention.

    Attributes:
        source: the picture as the model sees it, fitted to its template. result: the edit, of the input's size.
        prompt, seed: of the edit.
        maps: one list a block, in the order asked for; one map a scale, coarse to fine.
    """

    source: Image.Image
    result: Image.Image
    prompt: str
    seed: int
    maps: list[list[AttentionMap]]


def default_blocks(transformer: VAREditTransformer) -> tuple[int, ...]:
    """The first block and a deep one, at three quarters of the depth."""
    return tuple(dict.fromkeys((0, transformer.config.num_blocks * 3 // 4)))


def check_blocks(blocks: Sequence[int], transformer: VAREditTransformer) -> tuple[int, ...]:
    """The blocks as they are, or ValueError for one that the model does not have."""
    last = transformer.config.num_blocks - 1
    for block in blocks:
        if not 0 <= block <= last:
            raise ValueError(f"block {block} does not exist; this model has blocks 0 to {last}")
    return tuple(dict.fromkeys(blocks))


def inspect_attention(
    pipeline: VAREditPipeline,
    image: ImageInput,
    prompt: str,
    blocks: Sequence[int] | None = None,
    *,
    size: int | None = None,
    fit: Fit | None = None,
    **options,
) -> Inspection:
    """Edit one picture and keep where the chosen blocks look; under guidance, with the instruction.

    Args:
        blocks: counted from 0; None takes `default_blocks`.
        options: seed, guidance_scale, temperature, top_p of the pipeline's call.

    Raises:
        ValueError: a block that does not exist, or what the pipeline refuses.
    """
    transformer = pipeline.transformer
    blocks = default_blocks(transformer) if blocks is None else check_blocks(blocks, transformer)
    size = pipeline.config.size if size is None else size
    fit = pipeline.config.fit if fit is None else fit
    prepared = prepare(image, size, fit)
    with torch.no_grad(), record_inputs(transformer, blocks) as inputs:
        output = pipeline(prepared.source, prompt, size=size, fit=fit, **options)
        maps = [
            [
                AttentionMap(block, part.scale, prepared.schedule, part.grids, part.mean_weights())
                for part in block_attention(transformer, block, inputs[block], prepared.schedule)
            ]
            for block in blocks
        ]
    return Inspection(to_pil(prepared.image_B3HW)[0], output.images[0], prompt, output.seeds[0], maps)


def mean_maps(inspections: Iterable[Inspection]) -> list[list[AttentionMap]]:
    """The mean over several edits of one schedule and the same blocks; keeps one edit at a time."""
    total: list[list[AttentionMap]] = []
    count = 0
    for item in inspections:
        count += 1
        if not total:
            total = [[replace(one, weights_lK=one.weights_lK.clone()) for one in maps] for maps in item.maps]
            continue
        assert item.maps[0][0].schedule == total[0][0].schedule
        for sums, maps in zip(total, item.maps):
            for summed, one in zip(sums, maps):
                summed.weights_lK.add_(one.weights_lK)
    return [[replace(one, weights_lK=one.weights_lK / count) for one in sums] for sums in total]


# -- capture -----------------------------------------------------------------------------------------------------------


@contextmanager
def record_inputs(transformer: VAREditTransformer, blocks: Sequence[int]) -> Iterator[dict[int, list[Tensor]]]:
    """Notes what enters the self-attention of some blocks: (B, S, D) of the source, then (B, l, D) of each scale."""
    inputs: dict[int, list[Tensor]] = {block: [] for block in blocks}

    def note(block: int):
        return lambda module, arguments: inputs[block].append(arguments[0].detach())

    layers = {block: _self_attention(transformer, block).to_qkv for block in blocks}
    handles = [layer.register_forward_pre_hook(note(block)) for block, layer in layers.items()]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def _self_attention(transformer: VAREditTransformer, block: int) -> SelfAttention:
    layer = transformer.blocks[block].self_attention
    assert isinstance(layer, SelfAttention)
    return layer


@dataclass(frozen=True, eq=False)
class ScaleAttention:
    """Queries of one scale and all that they see, (N, tokens, E) each; `grids` are those of the source's keys."""

    scale: int
    grids: tuple[Grid, ...]
    q_NlE: Tensor
    k_NKE: Tensor
    v_NKE: Tensor

    def head_weights(self) -> Iterator[Tensor]:
        """float32 (l, K) of one head after the other: all at once would take gigabytes in a large model."""
        for q_lE, k_KE in zip(self.q_NlE.float(), self.k_NKE.float()):
            yield (q_lE @ k_KE.T).softmax(-1)

    def mean_weights(self) -> Tensor:
        """float32 (l, K) on the CPU, the mean over the heads."""
        total_lK = torch.zeros(self.q_NlE.shape[1], self.k_NKE.shape[1], device=self.q_NlE.device)
        for weights_lK in self.head_weights():
            total_lK += weights_lK
        return (total_lK / len(self.q_NlE)).cpu()


def block_attention(
    transformer: VAREditTransformer, block: int, inputs: list[Tensor], schedule: ScaleSchedule
) -> Iterator[ScaleAttention]:
    """Queries, keys and values of every scale in one block, for the first row of what `record_inputs` noted."""
    config, attention = transformer.config, _self_attention(transformer, block)
    assert len(inputs) == schedule.num_scales + 1, "one prefill and one pass a scale"
    head_size = config.width // config.num_heads
    weight = attention.q_bias  # under offload the weights have left the device, or are not there outside of a call
    device = inputs[0].device if weight.is_meta else weight.device
    inputs = [part.to(device) for part in inputs]
    source_positions, target_positions = token_positions(schedule, config.conditioning, config.position_layout)
    source_rotary = rotary_table(source_positions, head_size, device)
    target_rotary = rotary_table(target_positions, head_size, device)
    aligned = config.conditioning == "sar" and block < config.num_aligned_blocks
    grids = source_grids(schedule, config.conditioning)
    _, *source = attention.project(inputs[0][:1], source_rotary)  # k, v
    pooled = [scale_aligned_reference(part, schedule) for part in source] if aligned else []
    targets: list[list[Tensor]] = [[], []]  # keys, values of the scales so far
    for scale, (start, end) in enumerate(zip(schedule.offsets, schedule.offsets[1:])):
        rotary = target_rotary[0][start:end], target_rotary[1][start:end]
        q, *new = attention.project(inputs[scale + 1][:1], rotary)
        for kept, part in zip(targets, new):
            kept.append(part)
        visible: tuple[Grid, ...]
        if aligned:
            visible, seen = (schedule.grids[scale],), [part[scale] for part in pooled]
        elif config.conditioning == "full":  # the ladder is laid out finest first: a scale sees its last `end` tokens
            visible, seen = grids[-scale - 1 :], [part[:, :, -end:] for part in source]
        else:
            visible, seen = grids, source
        k, v = (torch.cat([first, *rest], dim=2)[0] for first, rest in zip(seen, targets))
        yield ScaleAttention(scale, visible, q[0], k, v)


# -- the figure --------------------------------------------------------------------------------------------------------

_INK, _PALE = (30, 30, 30), (110, 110, 110)
_HEAT = np.array([(255, 255, 255), (254, 217, 142), (227, 74, 51), (84, 10, 30)], np.float32)
_MATRIX, _CELL, _MARGIN, _LINE = 118, 252, 14, 17


def draw_attention(
    maps: Sequence[Sequence[AttentionMap]], title: str, inspection: Inspection | None = None
) -> Image.Image:
    """A labelled figure: a row a block, a column a scale.

    Args:
        maps: one list a block, as in `Inspection`.
        title: the first line.
        inspection: of a single edit: its pictures are shown, and the attention is laid over its source.
    """
    overlay_height = 0
    if inspection is not None:
        overlay_height = round(_CELL * inspection.source.height / inspection.source.width)
    row_height = 3 * _LINE + overlay_height + _MATRIX + _LINE + _MARGIN
    left = _MARGIN if inspection is None else 2 * _MARGIN + _CELL
    head = 5 * _LINE
    width = left + len(maps[0]) * (_CELL + _MARGIN)
    pictures_height = 2 * (overlay_height + 2 * _LINE)  # none without an inspection, and then no row is as low
    height = head + max(len(maps) * row_height, pictures_height) + _MARGIN
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    _write(draw, (_MARGIN, 8), shorten(title, width // 9, placeholder=" ..."), size=17)
    lines = (
        "Each matrix: rows are the tokens of the scale, columns what they attend to: the source, then the target so "
        "far. Mean over the heads; dark is much.",
        "A diagonal means that a token looks at its own place. Distance 0: at its own place only; 1: everywhere alike.",
    )
    for number, line in enumerate(lines):
        _write(draw, (_MARGIN, 8 + (number + 1) * _LINE + 8), line, _PALE)
    if inspection is not None:
        _pictures(sheet, draw, inspection, head, overlay_height)
    for row, of_block in enumerate(maps):
        top = head + row * row_height
        for column, one in enumerate(of_block):
            at = (left + column * (_CELL + _MARGIN), top)
            _cell(sheet, draw, one, at, inspection, overlay_height)
    return sheet


def _pictures(sheet: Image.Image, draw: ImageDraw.ImageDraw, inspection: Inspection, top: int, height: int) -> None:
    for name, picture in (("source", inspection.source), (f"edit, seed {inspection.seed}", inspection.result)):
        shown = ImageOps.contain(picture, (_CELL, height), Image.Resampling.LANCZOS)
        _write(draw, (_MARGIN, top), name)
        sheet.paste(shown, (_MARGIN, top + _LINE))
        top += height + 2 * _LINE


def _cell(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    one: AttentionMap,
    at: tuple[int, int],
    inspection: Inspection | None,
    overlay_height: int,
) -> None:
    left, top = at
    h, w = one.schedule.grids[one.scale]
    source, earlier, own = one.shares
    _write(draw, (left, top), f"block {one.block}, scale {one.scale + 1} ({w} x {h})", size=14)
    _write(draw, (left, top + _LINE), f"source {source:.0%}, earlier {earlier:.0%}, own {own:.0%}", _PALE)
    _write(draw, (left, top + 2 * _LINE), f"distance in the source {format_distance(one)}", _PALE)
    top += 3 * _LINE
    if inspection is not None:
        sheet.paste(_overlay(inspection.source, one.source_map, (_CELL, overlay_height)), (left, top))
        top += overlay_height + 4
    matrix, split = one.weights_lK.numpy(), one.num_source
    # One range for both parts: they are shares of the same sum.
    largest = max(float(np.quantile(matrix, 0.995)), 1e-9)
    half = (_CELL - 6) // 2
    for name, part, x in (("source", matrix[:, :split], left), ("target so far", matrix[:, split:], left + half + 6)):
        colours = _heat(np.sqrt(np.clip(part / largest, 0, 1)))
        resampling = (
            Image.Resampling.BOX if part.shape[1] > half or part.shape[0] > _MATRIX else Image.Resampling.NEAREST
        )
        sheet.paste(Image.fromarray(colours).resize((half, _MATRIX), resampling), (x, top))
        draw.rectangle((x, top, x + half - 1, top + _MATRIX - 1), outline=(190, 190, 190))
        label = f"{name}, {part.shape[1]} token{'s' if part.shape[1] > 1 else ''}"
        _write(draw, (x, top + _MATRIX), label, _PALE, size=11)


def format_distance(one: AttentionMap) -> str:
    return "-" if one.distance is None else f"{one.distance:.2f}"


def _overlay(source: Image.Image, heat_hw: Tensor, size: tuple[int, int]) -> Image.Image:
    """The source in grey under the attention it gets; attention everywhere alike is a third of the full red."""
    values = (heat_hw * heat_hw.numel() / 3).clamp(max=1).numpy()
    mask = Image.fromarray(np.uint8(values * 225)).resize(size, Image.Resampling.BICUBIC)
    grey = source.convert("L").convert("RGB").resize(size, Image.Resampling.LANCZOS)
    return Image.composite(Image.new("RGB", size, (227, 60, 30)), grey, mask)


def _heat(values: np.ndarray) -> np.ndarray:
    """0..1 -> uint8 colours from white to dark red."""
    places = np.linspace(0, 1, len(_HEAT))
    return np.stack([np.interp(values, places, _HEAT[:, channel]) for channel in range(3)], -1).astype(np.uint8)


def _write(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, fill: tuple[int, int, int] = _INK, size: int = 13
) -> None:
    draw.text(at, text, fill, ImageFont.load_default(size))
