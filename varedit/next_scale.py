"""Next-scale prediction: the loop of an edit from the coarsest scale to the finest (paper section 3.1)."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from varedit import quantizer
from varedit.sampling import Sampling, guide, random_uniform, sample_bits
from varedit.scales import ScaleSchedule
from varedit.transformer import VAREditTransformer


def next_scales(
    transformer: VAREditTransformer,
    schedule: ScaleSchedule,
    patch_size: int,
    source_BChw: Tensor,
    text_BTF: Tensor,
    text_mask_BT: Tensor,
    seeds_B: Tensor,
    sampling: Sampling,
    constrain: Callable[[int, Tensor, Tensor], Tensor] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Sample the bits of scale after scale, each put onto the canvas before the next is predicted.

    Args:
        source_BChw: continuous source features on the finest token grid.
        text_BTF, text_mask_BT: the instructions' encoder states, right-padded, and True where there is text.
        seeds_B: int64, one an image, on the device of the rest.
        constrain: (scale, bits, canvas before them) -> the bits to put onto the canvas instead.

    Yields:
        After each scale its bits, bool (B, d, h_k, w_k), and the canvas, float32 (B, d, h, w).
    """
    count, device, guided = len(source_BChw), source_BChw.device, sampling.guidance_scale != 1
    drop_text_B = torch.zeros(count, dtype=torch.bool, device=device)
    if guided:  # the unguided branch rides in the same batch: the same source, the instruction dropped
        source_BChw, text_BTF, text_mask_BT = (torch.cat([x, x]) for x in (source_BChw, text_BTF, text_mask_BT))
        drop_text_B = torch.cat([drop_text_B, ~drop_text_B])
    cache = transformer(
        schedule, source_BChw=source_BChw, text_BTF=text_BTF, text_mask_BT=text_mask_BT, drop_text_B=drop_text_B
    )
    num_code_bits = transformer.config.num_bits // patch_size**2
    canvas_BChw = quantizer.empty_canvas(count, num_code_bits, schedule, patch_size, device)
    inputs_BlC = None
    for scale in range(schedule.num_scales):
        if scale:
            inputs_BlC = quantizer.next_input(canvas_BChw, schedule, scale, patch_size)
            inputs_BlC = torch.cat([inputs_BlC, inputs_BlC]) if guided else inputs_BlC
        logits_BlC2 = transformer(schedule, inputs_BlC, scale=scale, cache=cache)
        if guided:
            logits_BlC2 = guide(logits_BlC2[:count], logits_BlC2[count:], sampling.guidance_scale)
        random_BlC = random_uniform(seeds_B, scale, *logits_BlC2.shape[1:3])
        bits_BlC = sample_bits(logits_BlC2, random_BlC, sampling.temperature, sampling.top_p)
        bits_BChw = quantizer.unpatchify(bits_BlC.float(), schedule.grids[scale], patch_size) > 0.5
        if constrain:
            bits_BChw = constrain(scale, bits_BChw, canvas_BChw)
        canvas_BChw = quantizer.accumulate(canvas_BChw, bits_BChw)
        yield bits_BChw, canvas_BChw
