"""Edits from the input to the output: what is locked, cropped, put back straight, and kept at 16 bits."""

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageOps
from scipy import ndimage

from varedit import quantizer
from varedit.editing.best_of import instruction_evidence, stray_changes
from varedit.editing.change_map import ChangeMap
from varedit.editing.edit import (
    SECOND_PASS_MARGIN,
    EditRequest,
    EditResult,
    Settings,
    apply_edit,
    apply_edits,
    result_canvas,
)
from varedit.editing.manifest import Manifest, make_manifest, save_with_manifest
from varedit.editing.mask import box_mask, changed_area, grow, model_mask, token_coverage
from varedit.editing.preserve import FEATHER
from varedit.editing.replay import check_file, replay
from varedit.editing.session import Session
from varedit.image_processor import LoadedImage, load_image, prepare
from varedit.image_tokenizer import VAREditImageTokenizer
from varedit.image_writer import encode_image
from varedit.pipeline import DEFAULT_MODEL, EditCancelled, ScaleStep, VAREditPipeline
from varedit.sixteen_bit import to_8_bit
from varedit.testing import tiny_pipeline, tiny_text_encoder, tiny_transformer

SIZE = (90, 60)
MASK = box_mask((12, 8, 40, 30), SIZE)
WHOLE = Settings(crop="off")


@pytest.fixture(scope="module")
def pipeline() -> VAREditPipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def picture() -> LoadedImage:
    return load_image(np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8))


def assert_same(result: EditResult, expected: EditResult) -> None:
    assert result.image.tobytes() == expected.image.tobytes()
    assert all(torch.equal(*pair) for pair in zip(result.bits, expected.bits, strict=True))


class Obedient(VAREditPipeline):
    """The default model's image tokenizer behind a model that draws what it is told to, as far as a lock lets it.

    `draw` makes the picture that it heads for from the one that it is shown.
    """

    draw: Callable[[Image.Image], Image.Image]

    def __call__(self, image, prompt, constrain_bits=None, **options):
        goals = [prepare(self.draw(item.source.rgb), item.schedule.size, item.fit).image_B3HW for item in image]

        def obey(sampled):
            goal_B3HW = torch.cat([goals[index] for index in sampled.indices])
            where = sampled.schedule, sampled.scale, sampled.patch_size
            features_BChw = self.image_tokenizer.encode(goal_B3HW)
            drawn = replace(sampled, bits_BChw=quantizer.residual_bits(features_BChw, sampled.canvas_BChw, *where))
            return constrain_bits(drawn) if constrain_bits else drawn.bits_BChw

        return super().__call__(image, prompt, constrain_bits=obey, **options)


@pytest.fixture(scope="module")
def obedient() -> Obedient:
    if not (DEFAULT_MODEL / "model_index.json").exists():
        pytest.skip("this checkout has no default model in varedit/models/tiny")
    image_tokenizer = VAREditImageTokenizer.from_pretrained(DEFAULT_MODEL, subfolder="image_tokenizer")
    transformer = tiny_transformer(num_bits=image_tokenizer.num_token_bits)
    tokenizer, text_encoder = tiny_text_encoder()
    pipeline = Obedient(transformer, image_tokenizer, text_encoder, tokenizer, size=128, guidance_scale=1.0)
    pipeline.draw = recoloured
    return pipeline


def scene(width: int, height: int, square: tuple[int, int, int, int]) -> Image.Image:
    """Ellipses in many shades and no blue, with a blue square (left, top, width, height) on them."""
    rng = np.random.default_rng(3)
    image = Image.new("RGB", (width, height), (120, 130, 90))
    draw = ImageDraw.Draw(image)
    for _ in range(60):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        radii = rng.uniform(0.02, 0.12, 2) * height
        red, green = (int(level) for level in rng.integers(10, 250, 2))
        draw.ellipse((x - radii[0], y - radii[1], x + radii[0], y + radii[1]), fill=(red, green, min(red, green)))
    left, top, side_x, side_y = square
    image.paste((20, 40, 220), (left, top, left + side_x, top + side_y))
    return image


def recoloured(image: Image.Image) -> Image.Image:
    """Blue turned red."""
    pixels = np.asarray(image).astype(int)
    blue = (pixels[..., 2] - pixels[..., 0] > 90)[..., None]
    return Image.fromarray(np.where(blue, pixels[..., ::-1], pixels).astype(np.uint8))


def far_from(change: ChangeMap, size: tuple[int, int]) -> np.ndarray:
    """Where an exact edit leaves the input of `size` (width, height) alone: bool (H, W).

    Farther from what changed than the border over which an edit fades, by a model pixel and a half for the enlarging.
    """
    far = ndimage.distance_transform_edt(~change.hard_HW) > FEATHER + 1.5
    return np.asarray(Image.fromarray(far).resize(size, Image.Resampling.NEAREST))


# -- the lock


def test_a_mask_of_everything_locks_nothing(pipeline, picture):
    free = apply_edit(pipeline, picture, "blur", seed=3, settings=WHOLE)
    held = replace(WHOLE, lock="mask")
    masked = apply_edit(pipeline, picture, "blur", seed=3, mask=Image.new("L", SIZE, 255), settings=held)
    assert_same(masked, free)


@torch.no_grad()
def test_the_lock_is_in_the_bits_and_the_pixels(pipeline, picture):
    locked = apply_edit(pipeline, picture, "blur", seed=3, mask=MASK, settings=Settings(lock="mask"))
    loose = apply_edit(pipeline, picture, "blur", seed=3, mask=MASK, settings=Settings(lock="off"))
    free = apply_edit(pipeline, picture, "blur", seed=3)
    assert all(torch.equal(*pair) for pair in zip(loose.bits, free.bits))
    prepared = prepare(picture, 128)
    features = pipeline.image_tokenizer.encode(prepared.image_B3HW)
    _, source_canvas = quantizer.encode_bits(features, prepared.schedule, 2)
    far = token_coverage(model_mask(MASK, prepared), prepared.schedule, -1, 2) == 0
    errors = [
        (result_canvas(result.bits, result.schedule, pipeline) - source_canvas).square().mean(1)[0][far].mean()
        for result in (locked, loose)
    ]
    assert errors[0] < 0.3 * errors[1]
    outside = np.asarray(MASK) == 0
    for lock in ("mask", "off"):
        result = apply_edit(pipeline, picture, "blur", seed=3, mask=MASK, settings=Settings(preserve="off", lock=lock))
        assert np.array_equal(np.asarray(result.image)[outside], np.asarray(picture.rgb)[outside])
        assert not np.array_equal(np.asarray(result.image), np.asarray(picture.rgb))


def test_a_batch_of_masked_and_unmasked_edits_equals_single_ones(pipeline, picture):
    wide = load_image(np.random.default_rng(1).integers(0, 256, (40, 90, 3), np.uint8))
    requests = [
        EditRequest(picture, "blur", 1),
        EditRequest(picture, "make it red", 2, MASK),
        EditRequest(wide, "blur", 3, box_mask((0, 0, 30, 40), (90, 40))),
    ]
    for request, result in zip(requests, apply_edits(pipeline, requests), strict=True):
        assert_same(result, apply_edit(pipeline, request.image, request.prompt, seed=request.seed, mask=request.mask))


def test_the_mask_grows_by_its_margin(pipeline, picture):
    result = apply_edit(pipeline, picture, "blur", seed=3, mask=MASK, settings=Settings(mask_margin=5))
    assert_same(result, apply_edit(pipeline, picture, "blur", seed=3, mask=grow(MASK, 5)))
    assert result.mask is MASK  # what was asked for; the margin is in the settings


def test_an_exact_edit_without_a_mask_leaves_alone_what_it_did_not_change(obedient, tmp_path):
    image = scene(192, 128, (60, 40, 36, 30))
    exact, loose = (
        apply_edit(obedient, image, "blue to red", seed=1, settings=Settings(preserve=mode))
        for mode in ("exact", "off")
    )
    far = far_from(exact.change_map, image.size)
    pixels, edited = np.asarray(image), np.asarray(exact.image)
    assert exact.change_map.kind == "local" and exact.area is None and far.mean() > 0.6
    assert np.array_equal(edited[far], pixels[far]) and edited[45:65, 65:90, 0].mean() > 150
    assert (np.asarray(loose.image)[far] != pixels[far]).any(-1).mean() > 0.9  # the model's own picture is another

    image.save(tmp_path / "photo.png")
    session = Session.create(tmp_path / "session", tmp_path / "photo.png")
    step = session.edit(obedient, "blue to red", seed=1)
    assert session.image().rgb.tobytes() == exact.image.tobytes() and not step.mask.exists()


def test_an_edit_of_the_whole_picture_in_an_area_is_drawn_freely(obedient, monkeypatch):
    image, area = scene(192, 128, (60, 40, 36, 30)), box_mask((20, 20, 100, 60), (192, 128))
    inside = np.asarray(area) > 0

    def edits(*locks: str) -> list[tuple]:
        found = []
        for lock in locks:
            steps: list[ScaleStep] = []
            request = EditRequest(image, "x", 1, area)
            (result,) = apply_edits(obedient, [request], Settings(lock=lock), lambda step, to=steps: to.append(step))
            assert np.array_equal(np.asarray(result.image)[~inside], np.asarray(image)[~inside])
            assert [step.second_pass for step in steps] == [False] * 5 + [True] * (len(steps) - 5)
            found.append((result.image.tobytes(), result.released, result.change_map, len(steps)))
        return found

    auto, held = edits("auto", "mask")
    assert auto[:2] == held[:2] and not auto[1] and auto[2].kind == "local" and (auto[3], held[3]) == (10, 5)
    monkeypatch.setattr(obedient, "draw", lambda image: image.convert("L").convert("RGB"))
    auto, free, held = edits("auto", "off", "mask")
    assert auto[0] == free[0] and auto[1] and auto[3] == 5 and free[2].kind == "global"
    assert held[0] != free[0] and not held[1]
    in_area = np.asarray(area.resize(free[2].hard_HW.shape[::-1], Image.Resampling.BOX)) > 0
    assert np.array_equal(auto[2].hard_HW, free[2].hard_HW & in_area) and not auto[2].soft_HW[~in_area].any()
    assert auto[2].kind == "local" and auto[2].area == auto[2].hard_HW.mean() and auto[2].stray == free[2].stray
    monkeypatch.setattr(obedient, "draw", ImageOps.mirror)  # the area would hold what came from elsewhere
    auto, held = edits("auto", "mask")
    assert auto[0] == held[0] and not auto[1]


def test_in_one_call_some_are_held_some_released_and_some_have_no_area(obedient, monkeypatch):
    def draw(image: Image.Image) -> Image.Image:
        return recoloured(image) if image.width > image.height else image.convert("L").convert("RGB")

    monkeypatch.setattr(obedient, "draw", draw)
    wide, tall = scene(192, 128, (60, 40, 36, 30)), scene(128, 192, (60, 40, 36, 30))
    requests = [
        EditRequest(wide, "x", 1),
        EditRequest(tall, "x", 2, box_mask((20, 20, 80, 100), tall.size)),
        EditRequest(wide, "x", 3, box_mask((20, 20, 100, 60), wide.size)),
    ]
    heard: list[tuple[int, ...]] = []
    results = apply_edits(obedient, requests, Settings(), lambda step: heard.append(step.indices))
    assert [result.released for result in results] == [False, True, False]
    assert sorted(set(heard)) == [(0, 2), (1,), (2,)] and heard.count((2,)) == 5
    for request, result in zip(requests, results):
        single = apply_edit(obedient, request.image, request.prompt, seed=request.seed, mask=request.mask)
        assert_same(result, single)


def test_a_second_pass_is_locked_to_what_the_first_one_changed(obedient):
    image = scene(192, 128, (60, 40, 36, 30))
    twice = apply_edit(obedient, image, "blue to red", seed=1, settings=Settings(lock="two-pass"))
    once = apply_edit(obedient, image, "blue to red", seed=1)
    assert once.change_map.kind == "local" and once.motion is None and not once.aligned
    area = changed_area(once.change_map.hard_HW, image.size, SECOND_PASS_MARGIN)
    assert_same(twice, apply_edit(obedient, image, "blue to red", seed=1, mask=area))
    changed = np.asarray(twice.area) > 0
    assert np.array_equal(np.asarray(twice.image)[~changed], np.asarray(image)[~changed])
    red = np.asarray(twice.image)[45:65, 65:90].mean((0, 1))
    assert red[0] > 150 and red[2] < 100 and twice.mask is None


def test_edits_of_the_whole_picture_need_no_second_pass(obedient, monkeypatch):
    monkeypatch.setattr(obedient, "draw", lambda image: image.convert("L").convert("RGB"))
    image = scene(192, 128, (60, 40, 36, 30))
    steps: list[ScaleStep] = []
    requests = [EditRequest(image, "gray", 1)]
    (twice,) = apply_edits(obedient, requests, Settings(lock="two-pass"), lambda step: steps.append(step))
    assert twice.change_map.kind == "global" and len(steps) == 5
    assert_same(twice, apply_edit(obedient, image, "gray", seed=1))


def test_the_callback_hears_of_both_passes_in_terms_of_the_call(obedient):
    large = scene(1500, 1000, (700, 400, 100, 100))
    requests = [EditRequest(large, "x", 1), EditRequest(scene(192, 128, (60, 40, 36, 30)), "x", 2)]
    steps: list[ScaleStep] = []
    sizes: list[tuple[int, int]] = []

    def look(step: ScaleStep) -> None:
        steps.append(step)
        sizes.extend(image.size for image in step.preview())

    first, second = apply_edits(obedient, requests, Settings(lock="two-pass"), look)
    assert first.box is not None and second.box is None
    assert {step.indices for step in steps} == {(0, 1), (0,), (1,)}  # the crop has a shape of its own
    assert set(sizes) == {(1500, 1000), (192, 128)}

    def stop(step: ScaleStep) -> bool:
        return False

    with pytest.raises(EditCancelled):
        apply_edits(obedient, requests, Settings(lock="two-pass"), stop)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lock": "tight"}, "lock 'tight' is unknown; use 'auto', 'mask', 'two-pass' or 'off'"),
        ({"crop": "on"}, "crop 'on' is unknown; use 'auto' or 'off'"),
        ({"mask_margin": -1}, "-1"),
        ({"mask_margin": 1.5}, "1.5"),
    ],
)
def test_impossible_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        Settings(**change)
    with pytest.raises(ValueError, match=message):
        Settings.from_json(change)


def test_an_empty_mask_is_refused(pipeline, picture):
    with pytest.raises(ValueError, match="empty"):
        apply_edit(pipeline, picture, "blur", mask=Image.new("L", SIZE))


def test_what_was_recorded_before_there_was_a_lock_had_none():
    older = Settings(guidance_scale=2.0).to_json()
    for name in ("lock", "crop", "mask_margin"):
        del older[name]
    assert Settings.from_json(older) == Settings(guidance_scale=2.0, lock="off", crop="off")


def test_bits_taken_from_the_source_are_no_evidence_of_an_instruction(pipeline, picture):
    result = apply_edit(pipeline, picture, "blur", seed=3, mask=MASK, settings=Settings(lock="mask"))
    everything, nothing = (replace(result, area=Image.new("L", SIZE, level)) for level in (255, 0))
    found = instruction_evidence(pipeline, [result, everything, nothing, replace(result, area=None)])
    assert found[1] == found[3] and found[2] == 0 and found[0] not in (0, found[1])


def test_what_a_released_edit_changed_outside_its_area_is_not_astray(obedient, monkeypatch):
    monkeypatch.setattr(obedient, "draw", lambda image: image.convert("L").convert("RGB"))
    image, area = scene(192, 128, (60, 40, 36, 30)), box_mask((20, 20, 100, 60), (192, 128))
    released, free = (
        apply_edit(obedient, image, "x", seed=1, mask=area, settings=Settings(lock=lock)) for lock in ("auto", "off")
    )
    assert released.released and released.change_map.stray == free.change_map.stray > 0.5
    assert stray_changes([released, free]) == [0.0, free.change_map.stray]


# -- crop, edit, stitch


def test_a_small_area_of_a_large_picture_is_edited_as_a_picture_of_its_own(obedient):
    image = scene(900, 600, (400, 250, 60, 60))
    mask = box_mask((390, 240, 80, 80), image.size)
    result = apply_edit(obedient, image, "blue to red", seed=1, mask=mask)
    left, top, right, bottom = result.box
    assert left < 390 and right > 470 and right - left < 450
    alone = apply_edit(obedient, image.crop(result.box), "blue to red", seed=1, mask=mask.crop(result.box))
    assert all(torch.equal(*pair) for pair in zip(result.bits, alone.bits, strict=True))
    assert result.image.crop(result.box).tobytes() == alone.image.tobytes()
    kept = np.asarray(mask) == 0
    assert np.array_equal(np.asarray(result.image)[kept], np.asarray(image)[kept])
    assert np.asarray(result.image)[260:300, 410:450].mean((0, 1))[0] > 150

    rows, columns = np.nonzero(result.change_map.hard_HW)  # the map is of the whole picture
    scale = image.width / result.change_map.hard_HW.shape[1]
    assert result.change_map.hard_HW.shape[1] > 128
    assert abs(columns.mean() * scale - 430) < 15 and abs(rows.mean() * scale - 280) < 15
    whole = apply_edit(obedient, image, "blue to red", seed=1, mask=mask, settings=WHOLE)
    true_area = 60 * 60 / (900 * 600)
    assert whole.box is None and true_area < result.change_map.area < whole.change_map.area
    assert result.change_map.area < 1.6 * true_area  # the model saw it larger


# -- alignment


def slipped(image: Image.Image) -> Image.Image:
    """Recoloured, then moved by 2.4, 0 pixels and zoomed by 1.01."""
    pixels = np.pad(np.asarray(recoloured(image)), ((16, 16), (16, 16), (0, 0)), mode="reflect")
    middle = (np.array(pixels.shape[:2]) - 1) / 2
    offset = middle - (middle + (0, 2.4)) / 1.01
    planes = [ndimage.affine_transform(pixels[..., c], (1 / 1.01,) * 2, offset, order=3) for c in range(3)]
    return Image.fromarray(np.dstack(planes)[16:-16, 16:-16])


def test_a_picture_that_slipped_is_put_back(obedient, monkeypatch):
    image = scene(384, 256, (120, 80, 72, 60))
    settings = Settings(size=256)
    monkeypatch.setattr(obedient, "draw", slipped)
    result = apply_edit(obedient, image, "blue to red", seed=1, settings=settings)
    assert result.aligned
    scale = image.width / 336  # of the template
    assert abs(result.motion.shift_x - 2.4) < 0.3 * scale and abs(result.motion.shift_y) < 0.3 * scale
    assert abs(result.motion.zoom - 1.01) < 0.003
    assert result.change_map.area < 0.1  # every edge of the picture had moved
    monkeypatch.setattr(obedient, "draw", lambda picture: slipped(picture).convert("L").convert("RGB"))
    gray = apply_edit(obedient, image, "gray", seed=1, settings=settings)
    assert gray.change_map.kind == "global" and not gray.aligned


# -- 16 bits


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
@pytest.mark.parametrize("bands", ["gray", "colour"])
def test_untouched_pixels_keep_all_16_bits(suffix, bands, obedient, monkeypatch, tmp_path):
    size, patch = (192, 128), (60, 40, 96, 70)

    def patched(image: Image.Image) -> Image.Image:
        image = image.copy()
        image.paste((250, 240, 20), patch)
        return image

    monkeypatch.setattr(obedient, "draw", patched)
    image = scene(*size, (0, 0, 1, 1)).convert("L" if bands == "gray" else "RGB")
    pixels = np.asarray(image).astype(np.uint16) * 257 ^ np.random.default_rng(0).integers(
        0, 64, np.asarray(image).shape, np.uint16
    )
    (tmp_path / f"in{suffix}").write_bytes(encode_image(load_image(pixels).rgb16_HW3, suffix))
    source = load_image(tmp_path / f"in{suffix}")
    assert np.array_equal(source.rgb16_HW3, load_image(pixels).rgb16_HW3)

    mask = box_mask((50, 30, 56, 50), size)
    result = apply_edit(obedient, source, "yellow", seed=2, mask=mask)
    manifest = make_manifest(result, obedient)
    out = save_with_manifest(result.pixels, tmp_path / f"out{suffix}", manifest, source)
    written = load_image(out).rgb16_HW3
    outside = np.asarray(mask) == 0
    assert np.array_equal(written[outside], source.rgb16_HW3[outside])
    assert (written[45:65, 65:90, 0] > 40_000).all()
    assert np.array_equal(np.asarray(result.image), to_8_bit(written))
    done = replay(Manifest.from_json(json.loads(json.dumps(manifest.to_json()))), source, obedient, mask)
    assert done.same and check_file(out, done.result) == []
    other = replace(source, rgb16_HW3=source.rgb16_HW3 ^ 1)  # the same 8 bits
    assert replay(manifest, other, obedient, mask).differences[0].startswith("input:")


def test_an_exact_edit_without_a_mask_keeps_all_16_bits(obedient):
    image = scene(192, 128, (60, 40, 36, 30))
    pixels = np.asarray(image).astype(np.uint16) * 257 ^ np.random.default_rng(0).integers(
        0, 64, (128, 192, 3), np.uint16
    )
    result = apply_edit(obedient, load_image(pixels), "blue to red", seed=1)
    far = far_from(result.change_map, image.size)
    assert result.change_map.kind == "local" and far.mean() > 0.6
    assert np.array_equal(result.rgb16_HW3[far], pixels[far])
    assert result.rgb16_HW3[45:65, 65:90, 0].mean() > 40_000


def test_without_preservation_16_bits_hold_the_edit(pipeline):
    source = load_image(np.random.default_rng(0).integers(0, 65536, (60, 90, 3), np.uint16))
    result = apply_edit(pipeline, source, "blur", seed=1, settings=Settings(preserve="off"))
    assert np.array_equal(result.rgb16_HW3, np.asarray(result.image).astype(np.uint16) * 257)


# -- replays


@pytest.mark.parametrize(
    "settings",
    [
        Settings(),
        Settings(lock="off"),
        Settings(lock="mask"),
        Settings(lock="two-pass", crop="off"),
        Settings(mask_margin=7, preserve="blend"),
    ],
    ids=lambda settings: f"{settings.lock} {settings.mask_margin} {settings.preserve}",
)
def test_replay_reproduces_masked_edits(settings, obedient):
    image = scene(900, 600, (400, 250, 60, 60))
    mask = box_mask((390, 240, 80, 80), image.size)
    result = apply_edit(obedient, image, "blue to red", seed=5, settings=settings, mask=mask)
    manifest = Manifest.from_json(json.loads(json.dumps(make_manifest(result, obedient).to_json())))
    assert manifest.output.get("crop") == (list(result.box) if result.box else None)
    done = replay(manifest, result.source, obedient, mask)
    assert done.same and done.result.rgb16_HW3 is None
    assert_same(done.result, result)
