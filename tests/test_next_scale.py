"""Next-scale prediction: what training sees of its own bits is what the model saw when it drew them."""

import torch

from varedit.next_scale import next_scales
from varedit.quantizer import decode_bits, patchify, teacher_forcing
from varedit.sampling import Sampling
from varedit.scales import scale_schedule
from varedit.testing import tiny_image_tokenizer, tiny_transformer


@torch.no_grad()
def test_training_on_its_own_bits_sees_the_inputs_that_it_drew_them_from():
    transformer, patch_size = tiny_transformer(), tiny_image_tokenizer().config.patch_size
    schedule, generator = scale_schedule(128, 1.5), torch.Generator().manual_seed(0)
    height, width = (patch_size * side for side in schedule.finest)
    num_code_bits = transformer.config.num_bits // patch_size**2
    source, target = torch.randn(2, 2, num_code_bits, height, width, generator=generator)
    source_BChw = patchify(source, patch_size).transpose(1, 2).unflatten(2, schedule.finest)
    text_BTF = torch.randn(2, 4, transformer.config.text_features, generator=generator)
    mask_BT = torch.ones(2, 4, dtype=torch.bool)
    seen = []
    handle = transformer.register_forward_pre_hook(
        lambda _module, arguments, options: seen.append(arguments[1]) if options.get("scale") else None,
        with_kwargs=True,
    )
    drawn = list(
        next_scales(
            transformer, schedule, patch_size, source_BChw, text_BTF, mask_BT, torch.tensor([3, 4]),
            Sampling(guidance_scale=2.0, temperature=1.0, top_p=1.0),
        )
    )  # fmt: skip
    handle.remove()
    own_bits = [bits for bits, _ in drawn]
    assert len(drawn) == schedule.num_scales and len(seen) == schedule.num_scales - 1
    for scale, (_, canvas) in enumerate(drawn):
        assert torch.equal(canvas, decode_bits(own_bits[: scale + 1], schedule, patch_size))
    forced = teacher_forcing(target, schedule, patch_size, own_bits=own_bits)
    assert torch.equal(forced.inputs_BLC, torch.cat([inputs[:2] for inputs in seen], dim=1))
    assert all(torch.equal(*inputs.chunk(2)) for inputs in seen)  # the unguided half sees the same canvas
