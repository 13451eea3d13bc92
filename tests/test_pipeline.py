"""The edit call: results do not depend on what else is in it, and the loop is the model's own masked pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops
from torch import Tensor

from varedit import quantizer
from varedit.image_processor import prepare, to_pil
from varedit.pipeline import MAX_SEED, EditCancelled, SampledScale, ScaleStep, VAREditOutput, VAREditPipeline
from varedit.sampling import guide, random_uniform, sample_bits
from varedit.scales import nearest_schedule, scale_schedule
from varedit.testing import tiny_image_tokenizer, tiny_pipeline
from varedit.text import encode_prompts

SIZE = 128
NUM_SCALES = 5
FLOAT_ERROR = 1e-4
"""Ten times the largest difference seen between the logits of a batch and of its members alone."""

SHAPES = [(96, 96), (140, 90), (90, 140), (120, 120), (150, 100)]  # three templates; the first and the fourth share one
PROMPTS = ["sepia", "make the sky a little more red, please", "add snow", "rotate it", "remove the dog on the left"]
SEEDS = [0, 1, MAX_SEED, 7, 7]


@pytest.fixture(scope="module")
def pipeline() -> VAREditPipeline:
    return tiny_pipeline(size=SIZE)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture of random pixels."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


PICTURES = [picture(*shape, seed) for seed, shape in enumerate(SHAPES)]


def assert_same_bits(bits: list[Tensor], expected: list[Tensor]) -> None:
    assert len(bits) == len(expected)
    for scale, (actual, wanted) in enumerate(zip(bits, expected)):
        assert torch.equal(actual, wanted), f"{(actual != wanted).sum()} bits differ at scale {scale}"


def largest_difference(image: Image.Image, other: Image.Image) -> int:
    return max(high for _, high in ImageChops.difference(image, other).getextrema())


@contextmanager
def recorded_logits(pipeline: VAREditPipeline, guidance_scale: float) -> Iterator[list[Tensor]]:
    """Collect what each scale is sampled from: guided logits (B, l, C, 2)."""
    logits: list[Tensor] = []

    def record(module, arguments, output) -> None:
        if isinstance(output, Tensor):  # the prefill returns a cache
            logits.append(guide(*output.chunk(2), guidance_scale) if guidance_scale != 1 else output)

    handle = pipeline.transformer.register_forward_hook(record)
    try:
        yield logits
    finally:
        handle.remove()


def distance_to_tie(logits_BlC2: Tensor, random_BlC: Tensor, temperature: float) -> Tensor:
    """How far each bit's logit margin lies from where the bit would change."""
    margin = logits_BlC2[..., 1] - logits_BlC2[..., 0]
    return (margin - temperature * torch.logit(random_BlC)).abs()


def token_bits(bits: list[Tensor], patch_size: int) -> list[Tensor]:
    """Bits of an output -> bool (1, l, C), as the transformer predicts them."""
    return [quantizer.patchify(canvas_bits(b).float(), patch_size) > 0.5 for b in bits]


def canvas_bits(bits_hwd: Tensor) -> Tensor:
    return bits_hwd.permute(2, 0, 1)[None].bool()


# -- a batch is its members ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance_scale, temperature", [(1.0, 1.0), (3.0, 0.5), (3.0, 0.0)])
def test_mixed_batch_equals_singles(pipeline, guidance_scale, temperature):
    """Bit for bit, except that a bit within float error of its tie may fall either way, and then what follows it.

    A batch adds up the same products in another order, which moves logits by about 1e-5.
    """
    options = {"guidance_scale": guidance_scale, "temperature": temperature}
    batch = pipeline(PICTURES, PROMPTS, seed=SEEDS, **options)
    assert len(set(batch.schedule)) == 3
    num_equal = 0
    for index, (image, prompt, seed) in enumerate(zip(PICTURES, PROMPTS, SEEDS)):
        with recorded_logits(pipeline, guidance_scale) as logits:
            single = pipeline(image, prompt, seed=seed, **options)
        assert (batch.seeds[index], batch.schedule[index]) == (single.seeds[0], single.schedule[0])
        together, alone = (token_bits(edited.bits[row], 2) for edited, row in ((batch, index), (single, 0)))
        for scale, logits_BlC2 in enumerate(logits):
            random_BlC = random_uniform(torch.tensor([seed]), scale, *logits_BlC2.shape[1:3])
            near_tie = distance_to_tie(logits_BlC2, random_BlC, temperature) < FLOAT_ERROR
            differs = together[scale] != alone[scale]
            assert not differs[~near_tie].any()
            if differs.any():
                break
        else:
            num_equal += 1
            assert largest_difference(batch.images[index], single.images[0]) == 0
    assert num_equal >= len(PICTURES) - 1  # more than one such bit in these inputs would be no accident


def test_logits_of_a_batch_equal_those_of_singles(pipeline):
    """Also with equal schedules and instructions of different lengths, where one batch runs all of it padded."""
    images, prompts, seeds = PICTURES[::3], PROMPTS[:2], [3, 4]
    with recorded_logits(pipeline, 3.0) as batch:
        pipeline(images, prompts, seed=seeds)
    assert len(batch) == NUM_SCALES and len(batch[0]) == 2
    for row in range(2):
        with recorded_logits(pipeline, 3.0) as single:
            pipeline(images[row], prompts[row], seed=seeds[row])
        for together, alone in zip(batch, single):
            torch.testing.assert_close(together[row], alone[0], rtol=0, atol=FLOAT_ERROR)


def test_random_numbers_of_a_batch_are_those_of_singles():
    together = random_uniform(torch.tensor(SEEDS), 3, 12, 16)
    for row, seed in enumerate(SEEDS):
        assert torch.equal(together[row], random_uniform(torch.tensor([seed]), 3, 12, 16)[0])


def test_order_in_the_call_does_not_matter(pipeline):
    forward = pipeline(PICTURES, PROMPTS, seed=SEEDS)
    backward = pipeline(PICTURES[::-1], PROMPTS[::-1], seed=SEEDS[::-1])
    for bits, expected in zip(backward.bits[::-1], forward.bits):
        assert_same_bits(bits, expected)


def test_one_image_with_many_seeds(pipeline):
    edited = pipeline(PICTURES[0], PROMPTS[0], seed=[5, 6, 5])
    assert len(edited.images) == 3 and edited.seeds == [5, 6, 5]
    assert_same_bits(edited.bits[0], edited.bits[2])
    assert not torch.equal(edited.bits[0][-1], edited.bits[1][-1])
    assert_same_bits(edited.bits[1], pipeline(PICTURES[0], PROMPTS[0], seed=6).bits[0])


def test_one_prompt_and_seed_for_many_images(pipeline):
    edited = pipeline(PICTURES[:2], "sepia", seed=9)
    assert edited.seeds == [9, 9]
    for index in range(2):
        assert_same_bits(edited.bits[index], pipeline(PICTURES[index], "sepia", seed=9).bits[0])


def test_one_image_with_many_prompts(pipeline):
    edited = pipeline(PICTURES[0], PROMPTS[:3], seed=2)
    assert len(edited.images) == 3
    assert_same_bits(edited.bits[1], pipeline(PICTURES[0], PROMPTS[1], seed=2).bits[0])


@pytest.mark.parametrize(
    "counts, message",
    [((3, 2, 1), "2 values for prompt"), ((2, 3, 1), "2 values for image"), ((3, 1, 2), "2 values for seed")],
)
def test_lists_of_different_lengths_are_refused(pipeline, counts, message):
    num_images, num_prompts, num_seeds = counts
    with pytest.raises(ValueError, match=f"{message}.*3 images; give 1 or 3"):
        pipeline(PICTURES[:num_images], PROMPTS[:num_prompts], seed=list(range(num_seeds)))


@pytest.mark.parametrize("argument", ["image", "prompt", "seed"])
def test_empty_lists_are_refused(pipeline, argument):
    arguments = {"image": PICTURES[0], "prompt": "sepia", "seed": 0} | {argument: []}
    with pytest.raises(ValueError, match=f"0 values for {argument}"):
        pipeline(**arguments)


# -- seeds ---------------------------------------------------------------------------------------------------------


def test_same_seed_twice_gives_the_same_bits(pipeline):
    first, second = (pipeline(PICTURES[1], "make it red", seed=11) for _ in range(2))
    assert_same_bits(first.bits[0], second.bits[0])
    assert largest_difference(first.images[0], second.images[0]) == 0


def test_no_seed_draws_one_each_and_reports_it(pipeline):
    edited = pipeline(PICTURES[:1] * 3, "make it red", temperature=2.0)
    assert len(set(edited.seeds)) == 3
    again = pipeline(PICTURES[0], "make it red", seed=edited.seeds, temperature=2.0)
    assert again.seeds == edited.seeds
    for bits, expected in zip(again.bits, edited.bits):
        assert_same_bits(bits, expected)


def test_seeds_may_be_given_for_some_images_only(pipeline):
    edited = pipeline(PICTURES[0], "make it red", seed=[3, None], temperature=2.0)
    assert edited.seeds[0] == 3 and edited.seeds[1] is not None
    assert_same_bits(edited.bits[0], pipeline(PICTURES[0], "make it red", seed=3, temperature=2.0).bits[0])


def test_the_global_random_state_is_neither_read_nor_changed(pipeline):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = pipeline(PICTURES[0], "make it red", seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert_same_bits(pipeline(PICTURES[0], "make it red", seed=1).bits[0], first.bits[0])


def test_seed_does_not_matter_at_temperature_0(pipeline):
    edited = pipeline(PICTURES[0], "make it red", seed=[1, 2], temperature=0)
    assert_same_bits(edited.bits[0], edited.bits[1])


# -- what comes back -----------------------------------------------------------------------------------------------


def test_outputs_have_the_inputs_sizes_and_the_tokenizers_grids(pipeline):
    edited = pipeline(PICTURES, PROMPTS, seed=SEEDS)
    for image, bits, schedule, (width, height) in zip(edited.images, edited.bits, edited.schedule, SHAPES):
        assert (image.size, image.mode) == ((width, height), "RGB")
        assert schedule == nearest_schedule(SIZE, height, width)
        assert [tuple(b.shape) for b in bits] == [(2 * h, 2 * w, 4) for h, w in schedule.grids]
        assert all(b.dtype == torch.uint8 and b.max() <= 1 for b in bits)


def test_a_tokenizer_of_stride_16_has_bits_on_the_token_grid():
    image_tokenizer = tiny_image_tokenizer(num_code_bits=16, multipliers=(1, 1, 1), patch_size=1)
    base = tiny_pipeline(size=SIZE)
    pipeline = VAREditPipeline(base.transformer, image_tokenizer, base.text_encoder, base.tokenizer, size=SIZE)
    edited = pipeline(PICTURES[1], "sepia", seed=0)
    assert [tuple(b.shape) for b in edited.bits[0]] == [(h, w, 16) for h, w in edited.schedule[0].grids]


def test_bits_decode_to_the_image(pipeline):
    edited = pipeline(PICTURES[1], "sepia", seed=3)
    schedule = edited.schedule[0]
    canvas_BChw = quantizer.decode_bits([canvas_bits(b) for b in edited.bits[0]], schedule, 2)
    with torch.no_grad():
        (decoded,) = to_pil(pipeline.image_tokenizer.decode(canvas_BChw))
    assert decoded.size == schedule.image_hw[::-1]
    restored = prepare(PICTURES[1], SIZE).restore(decoded)
    assert largest_difference(restored, edited.images[0]) == 0


def test_an_image_of_a_templates_exact_size_is_not_resampled(pipeline):
    schedule = scale_schedule(SIZE, 1.5)
    height, width = schedule.image_hw
    image = picture(width, height)
    with record_encoder_input(pipeline) as seen:
        edited = pipeline(image, "sepia", seed=3)
    exact = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    torch.testing.assert_close(seen[0], exact, rtol=0, atol=1e-6)
    canvas_BChw = quantizer.decode_bits([canvas_bits(b) for b in edited.bits[0]], schedule, 2)
    with torch.no_grad():
        (decoded,) = to_pil(pipeline.image_tokenizer.decode(canvas_BChw))
    assert edited.schedule == [schedule]
    assert largest_difference(decoded, edited.images[0]) == 0


@contextmanager
def record_encoder_input(pipeline: VAREditPipeline) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    handle = pipeline.image_tokenizer.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()


def test_every_kind_of_image_input_gives_the_same_edit(pipeline, tmp_path: Path):
    image = PICTURES[1]
    path = tmp_path / "picture.png"
    image.save(path)
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    edited = pipeline([image, path, str(path), path.read_bytes(), array, tensor], "sepia", seed=1)
    for bits in edited.bits[1:]:
        assert_same_bits(bits, edited.bits[0])


def test_size_and_fit_of_a_call(pipeline):
    larger = pipeline(PICTURES[1], "sepia", seed=1, size=256)
    assert larger.schedule == [nearest_schedule(256, 90, 140)] and larger.images[0].size == (140, 90)
    square = pipeline(PICTURES[1], "sepia", seed=1, fit="square")
    assert square.schedule == [scale_schedule(SIZE)] and square.images[0].size == (140, 90)


def test_defaults_are_those_of_the_model():
    base = tiny_pipeline()
    options = {"size": SIZE, "fit": "square", "guidance_scale": 2.0, "temperature": 0.3, "top_p": 0.8}
    pipeline = VAREditPipeline(base.transformer, base.image_tokenizer, base.text_encoder, base.tokenizer, **options)
    expected = base(PICTURES[1], "sepia", seed=1, **options)
    assert_same_bits(pipeline(PICTURES[1], "sepia", seed=1).bits[0], expected.bits[0])


# -- the loop is the model -----------------------------------------------------------------------------------------


def full_pass(pipeline: VAREditPipeline, edited: VAREditOutput, image, prompt: str, dropped: bool = False) -> Tensor:
    """Logits (1, L, C, 2) of one masked pass over all scales, teacher-forced with the bits of an edit."""
    schedule, patch_size = edited.schedule[0], pipeline.image_tokenizer.config.patch_size
    bits = [canvas_bits(b) for b in edited.bits[0]]
    inputs = [
        quantizer.next_input(quantizer.decode_bits(bits[:scale], schedule, patch_size), schedule, scale, patch_size)
        for scale in range(1, schedule.num_scales)
    ]
    (text_TF,) = encode_prompts([prompt], pipeline.tokenizer, pipeline.text_encoder, 64)
    with torch.no_grad():
        features_BChw = pipeline.image_tokenizer.encode(prepare(image, SIZE).image_B3HW)
        source_BChw = quantizer.patchify(features_BChw, patch_size).transpose(1, 2).unflatten(2, schedule.finest)
        return pipeline.transformer(
            schedule,
            torch.cat(inputs, dim=1),
            source_BChw=source_BChw,
            text_BTF=text_TF[None],
            drop_text_B=torch.tensor([dropped]),
        )


def assert_sampled_from(logits_BLC2: Tensor, edited: VAREditOutput, seed: int, temperature: float, top_p: float = 1.0):
    """The bits of an edit are those that the logits and the seed give, wherever no tie is near."""
    counts = edited.schedule[0].num_tokens
    random_BLC = torch.cat([random_uniform(torch.tensor([seed]), k, count, 16) for k, count in enumerate(counts)], 1)
    wanted = sample_bits(logits_BLC2, random_BLC, temperature, top_p)
    clear = distance_to_tie(logits_BLC2, random_BLC, temperature) > FLOAT_ERROR
    actual = torch.cat(token_bits(edited.bits[0], 2), dim=1)
    assert clear.float().mean() > 0.999
    assert torch.equal(actual[clear], wanted[clear])


@pytest.mark.parametrize("position_layout", ["offset", "released"])
@pytest.mark.parametrize("conditioning", ["sar", "finest", "full"])
def test_cached_loop_equals_one_masked_pass(conditioning, position_layout):
    pipeline = tiny_pipeline(size=SIZE, conditioning=conditioning, position_layout=position_layout)
    for temperature in (0.0, 0.7):
        edited = pipeline(PICTURES[1], "sepia", seed=5, temperature=temperature, guidance_scale=1)
        assert_sampled_from(full_pass(pipeline, edited, PICTURES[1], "sepia"), edited, 5, temperature)


def test_guided_loop_equals_two_masked_passes(pipeline):
    edited = pipeline(PICTURES[2], "a longer instruction", seed=8, temperature=0.5, guidance_scale=3)
    conditional, unconditional = (
        full_pass(pipeline, edited, PICTURES[2], "a longer instruction", dropped=d) for d in (False, True)
    )
    assert (conditional - unconditional).abs().max() > 0.1
    assert_sampled_from(3 * conditional - 2 * unconditional, edited, 8, 0.5)


def test_top_p_of_the_loop(pipeline):
    edited = pipeline(PICTURES[1], "sepia", seed=5, temperature=1.0, top_p=0.6, guidance_scale=1)
    logits_BLC2 = full_pass(pipeline, edited, PICTURES[1], "sepia")
    probability = logits_BLC2.softmax(-1)
    sure = probability.amax(-1) > 0.6 + FLOAT_ERROR
    actual = torch.cat(token_bits(edited.bits[0], 2), dim=1)
    assert 0 < (~sure).sum() < sure.sum()
    assert torch.equal(actual[sure], (logits_BLC2[..., 1] > logits_BLC2[..., 0])[sure])


def test_guidance_0_ignores_the_instruction(pipeline):
    prompts = ["sepia", "night"]  # of equal length: the unguided text has as many rows as the instruction
    edited = pipeline(PICTURES[0], prompts, seed=1, temperature=0.5, guidance_scale=0)
    assert_same_bits(edited.bits[0], edited.bits[1])


def test_instruction_and_source_matter(pipeline):
    with recorded_logits(pipeline, 1.0) as logits:
        pipeline([PICTURES[0], PICTURES[0], PICTURES[3]], ["sepia", "night", "sepia"], seed=1, guidance_scale=1)
    for logits_BlC2 in logits:
        assert (logits_BlC2[1] - logits_BlC2[0]).abs().max() > 100 * FLOAT_ERROR
        assert (logits_BlC2[2] - logits_BlC2[0]).abs().max() > 100 * FLOAT_ERROR


# -- instructions as features --------------------------------------------------------------------------------------


def test_prompt_embeds_equal_the_prompt(pipeline):
    embeds = encode_prompts(PROMPTS, pipeline.tokenizer, pipeline.text_encoder, 64)
    expected = pipeline(PICTURES, PROMPTS, seed=SEEDS)
    # No text encoder is needed then.
    bare = VAREditPipeline(pipeline.transformer, pipeline.image_tokenizer, size=SIZE)
    for bits, wanted in zip(bare(PICTURES, prompt_embeds=embeds, seed=SEEDS).bits, expected.bits):
        assert_same_bits(bits, wanted)
    assert_same_bits(bare(PICTURES[0], prompt_embeds=embeds[0], seed=SEEDS[0]).bits[0], expected.bits[0])


# -- callback ------------------------------------------------------------------------------------------------------


def test_callback_is_called_once_a_scale_for_each_schedule(pipeline):
    steps: list[ScaleStep] = []
    previews: list[list[Image.Image]] = []

    def on_scale(step: ScaleStep) -> None:
        steps.append(step)
        previews.append(step.preview())

    images = [PICTURES[0], PICTURES[1], PICTURES[3]]
    edited = pipeline(images, "sepia", seed=1, callback_on_scale=on_scale)
    for indices in ((0, 2), (1,)):
        own = [step for step in steps if step.indices == indices]
        schedule = edited.schedule[indices[0]]
        assert [step.scale for step in own] == list(range(NUM_SCALES))
        assert [step.grid for step in own] == list(schedule.grids)
        assert {step.num_scales for step in own} == {NUM_SCALES}
        assert sorted(step.seconds for step in own) == [step.seconds for step in own]
    assert len(steps) == 2 * NUM_SCALES
    for step, preview in zip(steps, previews):
        assert [image.size for image in preview] == [images[index].size for index in step.indices]
        if step.scale == NUM_SCALES - 1:
            for index, image in zip(step.indices, preview):
                assert largest_difference(image, edited.images[index]) == 0
    for bits, expected in zip(edited.bits, pipeline(images, "sepia", seed=1).bits):
        assert_same_bits(bits, expected)  # looking changes nothing


def test_callback_cancels_by_returning_false(pipeline):
    calls: list[int] = []

    def on_scale(step: ScaleStep) -> bool:
        calls.append(step.scale)
        return step.scale < 1

    expected = pipeline(PICTURES[0], "sepia", seed=1)
    with pytest.raises(EditCancelled, match="scale 2 of 5"):
        pipeline(PICTURES[0], "sepia", seed=1, callback_on_scale=on_scale)
    assert calls == [0, 1]
    assert_same_bits(pipeline(PICTURES[0], "sepia", seed=1).bits[0], expected.bits[0])


# -- constraints ---------------------------------------------------------------------------------------------------


def test_a_constraint_decides_what_goes_onto_the_canvas(pipeline):
    """It is told of each scale as the loop sees it; its bits are those that come back and that later scales see."""
    told: list[SampledScale] = []

    def invert_first(sampled: SampledScale) -> Tensor:
        told.append(sampled)
        return ~sampled.bits_BChw if sampled.scale == 0 else sampled.bits_BChw

    images = [PICTURES[0], PICTURES[1], PICTURES[3]]
    free = pipeline(images, "sepia", seed=1)
    edited = pipeline(images, "sepia", seed=1, constrain_bits=invert_first)
    for index in range(3):
        assert torch.equal(edited.bits[index][0], 1 - free.bits[index][0])
        assert not torch.equal(edited.bits[index][-1], free.bits[index][-1])
    for indices in ((0, 2), (1,)):
        own = [sampled for sampled in told if sampled.indices == indices]
        schedule = edited.schedule[indices[0]]
        assert [sampled.scale for sampled in own] == list(range(NUM_SCALES))
        with torch.no_grad():
            features = [pipeline.image_tokenizer.encode(prepare(images[i], SIZE).image_B3HW) for i in indices]
        for sampled in own:
            assert (sampled.schedule, sampled.patch_size) == (schedule, 2)
            torch.testing.assert_close(sampled.features_BChw, torch.cat(features), rtol=0, atol=FLOAT_ERROR)
            for row, index in enumerate(indices):
                so_far = [canvas_bits(part) for part in edited.bits[index][: sampled.scale]]
                canvas = quantizer.decode_bits(so_far, schedule, 2) if so_far else torch.zeros(1)
                assert torch.equal(sampled.canvas_BChw[row], canvas[0].expand_as(sampled.canvas_BChw[row]))


def test_a_constraint_that_changes_nothing_changes_nothing(pipeline):
    same = pipeline(PICTURES, PROMPTS, seed=SEEDS, constrain_bits=lambda sampled: sampled.bits_BChw)
    for bits, expected in zip(same.bits, pipeline(PICTURES, PROMPTS, seed=SEEDS).bits):
        assert_same_bits(bits, expected)


def test_output_type_bits_is_the_same_edit_not_decoded(pipeline):
    decoded = []
    handle = pipeline.image_tokenizer.decoder.register_forward_hook(lambda *_: decoded.append(1))
    try:
        edited = pipeline(PICTURES, PROMPTS, seed=SEEDS, output_type="bits")
    finally:
        handle.remove()
    assert edited.images == [] and decoded == []
    expected = pipeline(PICTURES, PROMPTS, seed=SEEDS)
    assert len(expected.images) == len(PICTURES) and edited.seeds == expected.seeds
    for bits, wanted in zip(edited.bits, expected.bits):
        assert_same_bits(bits, wanted)


def test_a_prepared_image_is_not_prepared_again(pipeline):
    prepared = prepare(PICTURES[1], SIZE)
    assert prepare(prepared, SIZE) is prepared
    assert_same_bits(pipeline(prepared, "sepia", seed=1).bits[0], pipeline(PICTURES[1], "sepia", seed=1).bits[0])
    with pytest.raises(ValueError, match="prepared for 128, 'native', not 256"):
        pipeline(prepared, "sepia", seed=1, size=256)
