"""Metrics equal to numbers worked out by hand or by an independent computation."""

import numpy as np
import pytest
import tiny_networks
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage

from varedit.evaluation import features, metrics
from varedit.evaluation.editors import make_editor
from varedit.evaluation.features import Backbones, Clip, backbones_of, clip_direction


def picture(seed, size=(64, 48)):
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (8, 8, 3)).astype(np.uint8))
    return np.asarray(small.resize(size, Image.Resampling.BICUBIC))


@pytest.fixture(scope="module", name="tiny_clip")
def _tiny_clip() -> Clip:
    return tiny_networks.tiny_clip()


@pytest.fixture(scope="module", name="tiny_vit")
def _tiny_vit():
    return tiny_networks.tiny_vit()


def test_background_averages_over_the_whole_frame():
    """PIE-Bench: the edited area is black in both pictures and counts as equal."""
    source = np.full((4, 4, 3), 100, np.uint8)
    result = source.copy()
    result[:, 2:] = 151  # 51 / 255 = 0.2
    mask = np.zeros((4, 4), bool)
    mask[:, 3] = True
    mse = 0.2**2 * 4 / 16  # one column of four differs outside the mask
    assert metrics.background_mse(source, result, mask) == pytest.approx(mse)
    assert metrics.background_psnr(source, result, mask) == pytest.approx(-10 * np.log10(mse))


def test_background_of_nothing_and_of_equal_pictures():
    source = picture(0)
    whole = np.ones(source.shape[:2], bool)
    assert metrics.background_mse(source, source, whole) is None
    assert metrics.background_psnr(source, source, whole) is None
    assert metrics.background_psnr(source, 255 - source, ~whole) < 20
    assert metrics.background_psnr(source, source, ~whole) == metrics.MAX_PSNR


def test_what_lpips_is_given(tmp_path):
    """PIE-Bench: both backgrounds on [-1, 1], the edited area at -1 in both; the result comes first."""
    from varedit.evaluation.cases import Benchmark, Case
    from varedit.evaluation.generate import generate, result_path
    from varedit.evaluation.scores import score

    mask = np.zeros((4, 6), bool)
    mask[1, 2] = True
    source, target = np.full((4, 6, 3), 51, np.uint8), np.full((4, 6, 3), 204, np.uint8)
    benchmark = Benchmark("own", (Case("k", "x", source, target=target, mask=mask),), ("lpips",))
    generate(benchmark, make_editor("oracle"), tmp_path)
    assert result_path(tmp_path, "k").is_file()
    given = []

    def lpips(first, second):
        given.append((first, second))
        return 0.25

    found = score(benchmark, tmp_path, ["lpips"], Backbones(given={"lpips": lpips}))
    ((first, second),) = given
    for tensor, value in ((first, 204), (second, 51)):
        expected = np.full((4, 6), value / 255 * 2 - 1)
        expected[1, 2] = -1
        assert tensor.shape == (1, 3, 4, 6) and np.allclose(tensor.numpy(), expected)
    assert found["rows"][0]["scores"] == {"lpips": 0.25}


def test_ssim_is_that_of_its_formula():
    pytest.importorskip("torchmetrics", reason="ssim comes from torchmetrics")
    source, result = picture(1), picture(2)
    mask = np.zeros(source.shape[:2], bool)
    mask[10:30, 10:40] = True
    x, y = (metrics.background(image, mask) for image in (source, result))

    def local(values):  # 11 x 11 Gaussian of 1.5 pixels
        return ndimage.gaussian_filter(values, (1.5, 1.5, 0), radius=(5, 5, 0), mode="mirror")

    mean_x, mean_y = local(x), local(y)
    variances = local(x * x) - mean_x**2 + local(y * y) - mean_y**2
    covariance = local(x * y) - mean_x * mean_y
    field = (2 * mean_x * mean_y + 1e-4) * (2 * covariance + 9e-4)
    field /= (mean_x**2 + mean_y**2 + 1e-4) * (variances + 9e-4)
    assert metrics.background_ssim(source, result, mask) == pytest.approx(field.mean(), abs=1e-3)
    assert metrics.background_ssim(source, source, mask) == pytest.approx(1)


def test_l1_and_l2_on_the_unit_scale():
    black, grey = np.zeros((5, 5, 3), np.uint8), np.full((5, 5, 3), 51, np.uint8)
    assert metrics.l1(black, grey) == pytest.approx(0.2) and metrics.l2(black, grey) == pytest.approx(0.04)


def test_wrong_sizes_are_fitted_as_the_references_do():
    collage = np.zeros((8, 16, 3), np.uint8)
    collage[:, 8:] = 255
    assert metrics.fit_result(collage, (8, 8), "corner").mean() == 255
    assert metrics.fit_result(collage, (8, 8), "resize").mean() == pytest.approx(127.5, abs=2)
    square = picture(3, (16, 16))
    bicubic = np.asarray(Image.fromarray(square).resize((8, 8), Image.Resampling.BICUBIC))
    assert (metrics.fit_result(square, (8, 8), "bicubic") == bicubic).all()
    assert metrics.fit_result(square, (8, 8), "corner").shape == (8, 8, 3)
    assert metrics.fit_result(square, (16, 16), "resize") is square


@pytest.mark.parametrize(("x", "y", "zoom"), [(0, 0, 1.0), (6, -4, 1.0), (0, 0, 1.04), (0, 0, 0.95)])
def test_alignment_finds_shift_and_zoom(x, y, zoom):
    rng = np.random.default_rng(0)
    large = Image.fromarray(rng.integers(0, 256, (40, 40, 3)).astype(np.uint8)).resize((400, 400), 3)
    source = np.asarray(large.crop((100, 100, 292, 292)))
    half = 96 / zoom
    box = (196 - half - x, 196 - half - y, 196 + half - x, 196 + half - y)
    result = np.asarray(large.resize((192, 192), Image.Resampling.BICUBIC, box=box))
    found = metrics.alignment(source, result)
    assert found[0] == pytest.approx(x / 192, abs=0.011) and found[1] == pytest.approx(y / 192, abs=0.011)
    assert found[2] == pytest.approx(zoom, abs=0.011)
    if (x, y, zoom) == (0, 0, 1):
        assert metrics.misalignment(source, result) == 0


def test_drift_leaves_out_what_any_turn_may_change():
    first = np.full((10, 10, 3), 100, np.uint8)
    result = first.copy()
    result[:5] = 200
    result[5:] = 104
    mask = np.zeros((10, 10), bool)
    mask[:3] = True
    other = np.zeros((10, 10), bool)
    other[3:5] = True
    assert metrics.drift(first, result, [mask, other]) == pytest.approx(4)
    assert metrics.drift(first, result, []) == pytest.approx(np.sqrt((100**2 + 4**2) / 2))
    assert metrics.drift(first, result, [~mask, mask]) is None


def test_clip_direction_normalises_before_subtracting():
    """Source (2, 0) and result (0, 6): unit vectors (1, 0) and (0, 1); the caption goes from (0, 1) to (1, 0)."""
    source, result = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 6.0])
    before, after = torch.tensor([0.0, 3.0]), torch.tensor([5.0, 0.0])
    assert clip_direction(source, result, before, after) == pytest.approx(-1)
    raw = float(np.dot([-2, 6], [5, -3]) / (np.hypot(2, 6) * np.hypot(5, 3)))
    assert clip_direction(source, result, before, after, normalise=False) == pytest.approx(raw)
    assert clip_direction(source, source * 3, before, after) == 0  # the picture did not turn
    assert clip_direction(source, result, before, before) == 0


def test_structure_input_stays_in_levels():
    """PIE-Bench: ImageNet statistics on 0..255, so white is about 1,130 and not 2."""
    white = np.full((224, 224, 3), 255, np.uint8)
    expected = (255 - 0.485) / 0.229
    assert features.structure_pixels(white)[0, 0].mean() == pytest.approx(expected, rel=1e-6)
    assert features.structure_pixels(np.zeros((512, 512, 3), np.uint8)).shape == (1, 3, 224, 224)
    assert features.structure_pixels(np.zeros((100, 400, 3), np.uint8)).shape == (1, 3, 120, 480)


def test_structure_input_worked_by_hand():
    """640 rows to 224: row i lies at (i + 0.5) * 640 / 224 - 0.5 and is mixed of the two rows around it."""
    rows = np.arange(640) % 251
    picture = np.broadcast_to(rows[:, None, None], (640, 640, 3)).astype(np.uint8)
    places = (np.arange(224) + 0.5) * 640 / 224 - 0.5
    below = np.floor(places).astype(int)
    mixed = rows[below] * (1 - (places - below)) + rows[below + 1] * (places - below)
    pixels = features.structure_pixels(picture)
    for channel, (mean, std) in enumerate(zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))):
        assert np.allclose(pixels[0, channel, :, 100], (mixed - mean) / std, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("side", [300, 301, 409, 767])
def test_the_short_side_is_never_a_pixel_short(side):
    assert features.structure_pixels(np.zeros((side, side, 3), np.uint8)).shape == (1, 3, 224, 224)
    assert features.clip_pixels(np.zeros((side, side, 3), np.uint8), 224, "pie-bench").shape == (1, 3, 224, 224)


def test_structure_distance_is_that_of_the_keys(tiny_vit):
    source, result = picture(4), picture(5)
    similar = []
    for image in (source, result):
        keys = []
        hook = tiny_vit.layers[-1].attention.k_proj.register_forward_hook(lambda m, i, o, keys=keys: keys.append(o))
        with torch.no_grad():
            tiny_vit(pixel_values=features.structure_pixels(image), interpolate_pos_encoding=True)
        hook.remove()
        keys = keys[0][0].double().numpy()
        norms = np.linalg.norm(keys, axis=1)
        similar.append(keys @ keys.T / np.outer(norms, norms))
    expected = ((similar[0] - similar[1]) ** 2).mean()
    assert features.structure_distance(tiny_vit, source, result) == pytest.approx(expected, rel=1e-4)
    assert features.structure_distance(tiny_vit, source, source) == 0


def test_clip_preprocessing_by_name():
    image = picture(6, (96, 64))
    squashed = features.clip_pixels(image, 32, "ip2p")
    unit = torch.from_numpy(image.copy()).permute(2, 0, 1)[None] / 255
    unit = F.interpolate(unit, size=(32, 32), mode="bicubic", align_corners=False)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (features.CLIP_MEAN, features.CLIP_STD))
    assert torch.allclose(squashed, (unit - mean) / std, atol=1e-5)
    cropped = features.clip_pixels(image, 32, "magicbrush") * std + mean
    by_hand = Image.fromarray(image).resize((48, 32), Image.Resampling.BICUBIC).crop((8, 0, 40, 32))
    assert np.allclose(cropped[0].permute(1, 2, 0).numpy() * 255, np.asarray(by_hand), atol=1e-3)
    with pytest.raises(ValueError, match="unknown"):
        features.clip_pixels(image, 32, "mine")


def test_dino_crops_the_centre():
    image = np.zeros((512, 512, 3), np.uint8)
    image[:30] = 255  # 15 rows of 256 after resizing; the crop starts at row 16
    pixels = features.dino_pixels(image)
    assert pixels.shape == (1, 3, 224, 224)
    assert pixels[0, 0, 4:].max() == pytest.approx(-0.485 / 0.229, abs=1e-5)


def test_clip_scores_with_a_tiny_model(tiny_clip, tiny_vit):
    image, other = picture(7), picture(8)
    embedding = tiny_clip.image(image)
    assert embedding.shape == (8,) and features.cosine(embedding, tiny_clip.image(image)) == pytest.approx(1)
    assert features.cosine(embedding, tiny_clip.image(other)) < 1
    long = tiny_clip.text("word " * 100)
    assert torch.equal(long, tiny_clip.text("word " * 200))  # cut at the model's length
    assert features.dino_embedding(tiny_vit, image).shape == (16,)


def test_embeddings_are_kept_for_a_while_and_never_mixed_up(tiny_clip):
    fresh = Clip(tiny_clip.model, tiny_clip.tokenizer)
    images = [picture(seed) for seed in range(12)]
    first = [fresh.image(image) for image in images]
    assert len(fresh._kept) == 8
    for image, embedding in zip(images, first):  # some from memory, some computed again
        assert torch.equal(fresh.image(image), embedding)
    assert fresh.image(images[-1]) is fresh.image(images[-1].copy())
    assert not torch.equal(fresh.text("a"), fresh.text("b"))


def test_a_network_that_is_not_at_hand_is_named():
    with pytest.raises(ValueError, match="cannot load 'no/such-model'.*--metrics"):
        _ = Backbones(clip_name="no/such-model").clip
    assert Backbones().protocol("clip") == {
        "name": "openai/clip-vit-base-patch32", "preprocessing": "magicbrush",
    }  # fmt: skip


def test_networks_and_preparation_by_benchmark_and_by_name():
    pie, emu = backbones_of("pie-bench"), backbones_of("emu-edit")
    assert pie.protocol("clip") == {"name": "openai/clip-vit-large-patch14", "preprocessing": "pie-bench"}
    assert emu.protocol("dino") == {"name": "facebook/dino-vits16"}
    other = backbones_of("emu-edit", "cpu", "ip2p", {"clip": "openai/clip-vit-large-patch14"})
    assert other.protocol("clip") == {"name": "openai/clip-vit-large-patch14", "preprocessing": "ip2p"}
    with pytest.raises(ValueError, match="preprocessing 'mine' is unknown; use pie-bench, magicbrush, ip2p"):
        backbones_of("emu-edit", "cpu", "mine")
    with pytest.raises(ValueError, match="network 'vgg' is unknown; use clip, dino, structure"):
        backbones_of("emu-edit", "cpu", None, {"vgg": "x"})


def test_every_metric_through_the_harness(tmp_path, tiny_clip, tiny_vit):
    """All scores of a case that has everything, with the source as the result."""
    pytest.importorskip("torchmetrics", reason="ssim comes from torchmetrics")
    from varedit.evaluation.cases import Benchmark, Case
    from varedit.evaluation.generate import generate
    from varedit.evaluation.scores import METRICS, check_metrics, score

    mask = np.zeros((48, 64), bool)
    mask[8:40, 8:40] = True
    source = picture(1)
    target = source.copy()
    target[mask] = 255 - source[mask]
    case = Case("k", "invert it", source, "x", target=target, mask=mask, source_caption="a", target_caption="b")
    benchmark = Benchmark("own", (case,), tuple(METRICS))
    networks = {"clip": tiny_clip, "dino": tiny_vit, "structure": tiny_vit,
                "lpips": lambda first, second: float((first - second).abs().mean())}  # fmt: skip
    models = Backbones(given=networks)
    check_metrics(benchmark.metrics, models)
    generate(benchmark, make_editor("identity"), tmp_path)
    values = score(benchmark, tmp_path, benchmark.metrics, models)["rows"][0]["scores"]
    whole = features.cosine(tiny_clip.image(source), tiny_clip.text("b"))
    edited = features.cosine(tiny_clip.image(source * mask[..., None]), tiny_clip.text("b"))
    expected = {
        "success": 0, "closer": 0, "half": 0, "completeness": 0, "balance": 0, "preservation": 1, "stray": 0,
        "outside_psnr": 60,
        "l1": metrics.l1(source, target), "l2": metrics.l2(source, target), "l1_source": 0, "clip_i_source": 1,
        "dino_source": 1, "structure": 0, "misalignment": 0, "drift": None, "psnr": metrics.MAX_PSNR, "mse": 0,
        "ssim": 1, "lpips": 0, "clip_dir": 0, "clip_out": whole, "clip_whole": max(0, whole),
        "clip_edit": max(0, edited), "clip_i": features.cosine(tiny_clip.image(source), tiny_clip.image(target)),
        "dino": features.cosine(features.dino_embedding(tiny_vit, source), features.dino_embedding(tiny_vit, target)),
    }  # fmt: skip
    assert set(values) == set(METRICS) == set(expected)
    assert values == {
        name: value if value is None else pytest.approx(value, abs=2e-6) for name, value in expected.items()
    }
