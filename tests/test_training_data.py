"""The data of a run: packed shards give the batches of the raw files, and stored features those of the models."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import ExifTags, Image

from varedit.cli import main
from varedit.data.features import FeatureEncoder, load_image_tokenizer, load_text_encoder, model_sha256
from varedit.data.packing import pack
from varedit.data.readers import read
from varedit.image_processor import prepare
from varedit.scales import scale_schedule
from varedit.testing import tiny_image_tokenizer, tiny_pipeline, tiny_text_encoder
from varedit.training.config import EditorConfig, load_config
from varedit.training.data import HeldOut, IndexedPairs, MicroBatch, MicroBatches, Plan, choose_phrasings
from varedit.training.processes import Processes
from varedit.training.sources import open_pairs
from varedit.training.trainer import EditorTraining

CPU = Processes(0, 1, torch.device("cpu"))
KINDS = [("png", (128, 128)), ("jpg", (96, 150)), ("bmp", (128, 128)), ("tif", (150, 96)), ("webp", (96, 150))]
NUM_PAIRS = 15


def picture(seed: int, height: int, width: int) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    """Pairs in five kinds of files and three shapes: a camera held sideways, 16 bits, several phrasings, masks, and
    pictures cut off in the middle.
    """
    folder = tmp_path_factory.mktemp("raw")
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    rows = []
    for index in range(NUM_PAIRS):
        suffix, (height, width) = KINDS[index % len(KINDS)]
        options = {"exif": turned} if suffix == "jpg" else {}
        row = {"source": f"{index}.{suffix}", "target": f"{index}_edited.{suffix}", "edit_type": "add"}
        for name, seed in (("source", index), ("target", 100 + index)):
            image = picture(seed, height, width)
            if suffix == "tif":
                image = Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 257)
            image.save(folder / row[name], **options)
        row |= {"instructions": [f"do {index}", f"please do {index}"]} if index % 2 else {"prompt": f"do {index}"}
        if index % 3 == 0:
            mask = np.zeros((width, height) if suffix == "jpg" else (height, width), bool)
            mask[20:50, 30 + index : 60] = True
            Image.fromarray(mask).save(folder / f"{index}_mask.png")
            row["mask"] = f"{index}_mask.png"
        rows.append(row)
    for index in (5, 11):
        path = folder / rows[index]["target"]
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def packed(tmp_path_factory, raw) -> Path:
    """The same in shards of two pairs."""
    folder = tmp_path_factory.mktemp("packed")
    pack(read(raw), folder, size=128, records_per_shard=2)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def config(tmp_path, model, raw):
    """Makes configs of a run on the raw pairs, with overrides."""
    values = {
        "start": str(model), "steps": 12, "batch_size": 4, "micro_batch_size": 2, "precision": "float32",
        "device": "cpu",
    }  # fmt: skip
    values["data"] = {"source": str(raw), "sizes": {128: 1}, "num_workers": 0, "validation_count": 3}
    values["data"]["max_bad_fraction"] = 0.1
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return lambda *overrides: load_config(EditorConfig, path, overrides)


def steps(settings: EditorConfig, folder: Path, models=None) -> list[MicroBatch]:
    """The micro-batches of a run, then those of its validation."""
    pairs, held_out = open_pairs(settings, CPU, folder, models)
    plan = Plan(pairs, settings.steps, settings.batch_size, settings.seed)
    held = HeldOut(held_out, settings.data.validation_count, settings.micro_batch_size, settings.seed)
    trained = MicroBatches(plan, settings.micro_batch_size)
    return [trained[number] for number in range(settings.steps * trained.parts)] + [
        held.batch(index) for index in range(len(held))
    ]


def same(first: MicroBatch, second: MicroBatch) -> bool:
    """Everything but the names of skipped pairs, which are places in files."""
    tensors = ("source_B3HW", "target_B3HW", "mask_BHW")
    others = ("step", "schedule", "positions", "instructions", "error")
    return (
        all(torch.equal(getattr(first, name), getattr(second, name)) for name in tensors)
        and all(getattr(first, name) == getattr(second, name) for name in others)
        and len(first.skipped) == len(second.skipped)
    )


# -- packed shards and raw files ---------------------------------------------------------------------------------------


def test_packed_shards_give_the_batches_of_the_raw_files(config, tmp_path, raw, packed):
    expected = steps(config(), tmp_path / "raw")
    found = steps(config(f"data.source={packed}"), tmp_path / "packed")
    assert len(list(packed.glob("*.tar"))) > 6
    assert len(found) == len(expected) > 24 and all(same(a, b) for a, b in zip(expected, found))
    assert any(batch.skipped for batch in found), "no picture that is cut off was met"
    assert {batch.schedule for batch in found} == {scale_schedule(128, ratio) for ratio in (0.666, 1.0, 1.5)}
    assert {len(texts) for batch in found for texts in batch.instructions} == {1, 2}
    assert [choose_phrasings(a, 0) for a in found] == [choose_phrasings(b, 0) for b in expected]
    assert {number for batch in found for number in choose_phrasings(batch, 0)} == {0, 1}
    masked = [not bool(mask.all()) for batch in found for mask in batch.mask_BHW]
    assert any(masked) and not all(masked)


def test_shards_continued_after_a_stop_give_them_too(config, tmp_path, raw, packed):
    def stopping():
        for number, item in enumerate(read(raw)):
            if number == 9:
                raise InterruptedError
            yield item

    with pytest.raises(InterruptedError):
        pack(stopping(), tmp_path / "shards", size=128, records_per_shard=2)
    pack(read(raw), tmp_path / "shards", size=128, records_per_shard=2)
    expected = steps(config(f"data.source={packed}", "steps=4"), tmp_path / "whole")
    found = steps(config(f"data.source={tmp_path / 'shards'}", "steps=4"), tmp_path / "continued")
    assert all(same(a, b) for a, b in zip(expected, found))


def test_pictures_in_archives_must_be_packed_first(config, tmp_path, raw):
    import tarfile

    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        for name in ("0.png", "0_edited.png"):
            archive.add(raw / name, name)
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"source": "0.png", "target": "0_edited.png", "prompt": "go"}))
    with pytest.raises(ValueError, match=r"0\.png of pairs\.jsonl line 1 lies in an archive: pack"):
        open_pairs(config(f"data.source={tmp_path}"), CPU, tmp_path / "run")


# -- masks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit", ["native", "square"])
@pytest.mark.parametrize("hw", [(128, 128), (200, 120), (301, 512)])
def test_masks_are_fitted_as_the_pictures_are(config, tmp_path, fit, hw):
    """A picture that is white where the mask is True shows through the fit where the fitted mask is."""
    mask = np.zeros(hw, bool)
    mask[:20, -40:] = mask[hw[0] // 2 : hw[0] // 2 + 30, 10:60] = True
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray(mask.astype(np.uint8)[..., None].repeat(3, 2) * 255).save(tmp_path / "picture.png")
    row = {"source": "picture.png", "target": "picture.png", "instructions": ["go"]}
    lines = [json.dumps(row | {"mask": "mask.png"}), json.dumps(row)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    settings = config(f"data.source={tmp_path}", f"data.fit={fit}", "data.validation_count=0", "data.sizes={256: 1}")
    pairs, _ = open_pairs(settings, CPU, tmp_path / "run")
    assert isinstance(pairs, IndexedPairs)
    (schedule,) = pairs.weights
    found, unmasked = (pairs.load(schedule, number) for number in (0, 1))
    assert unmasked.mask_HW is None
    prepared = prepare(tmp_path / "picture.png", 256, fit)
    left, top, right, bottom = (round(edge) for edge in prepared.content_box)
    shown_HW = prepared.image_B3HW[0].mean(0)
    inside = torch.zeros(schedule.image_hw, dtype=torch.bool)
    inside[top:bottom, left:right] = True
    white, black = shown_HW > 0.99, shown_HW < -0.99
    if fit == "square":
        assert not found.mask_HW[~inside].any()
        white &= inside
    assert found.mask_HW[white].all() and white.sum() > 300
    # Resampling rings: away from every white pixel nothing is covered.
    near = torch.nn.functional.max_pool2d(1 - black.float()[None], 9, 1, 4)[0] > 0
    assert not found.mask_HW[~near & inside].any() and (~near & inside).sum() > 500


def test_a_mask_of_another_size_makes_a_pair_unusable(config, tmp_path):
    picture(0, 64, 64).save(tmp_path / "a.png")
    Image.new("1", (32, 32)).save(tmp_path / "mask.png")
    row = {"source": "a.png", "target": "a.png", "instructions": ["go"]}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row | {"mask": "mask.png"}))
    with pytest.raises(ValueError, match="no usable pair: 0 pairs, 1 skipped \\(sizes differ 1\\)"):
        open_pairs(config(f"data.source={tmp_path}"), CPU, tmp_path / "run")


def test_the_world_brings_its_masks(config, tmp_path):
    pairs, _ = open_pairs(config("data.source=world"), CPU, tmp_path)
    batch = MicroBatches(Plan(pairs, 3, 8, 0), 8)[1]
    assert batch.mask_BHW.shape == (8, *batch.schedule.image_hw) and batch.mask_BHW.dtype == torch.bool
    changed_BHW = (batch.source_B3HW != batch.target_B3HW).any(1)
    assert changed_BHW.any() and not (changed_BHW & ~batch.mask_BHW).any() and not batch.mask_BHW.all()


# -- stored features ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def featured(tmp_path_factory, raw, model) -> dict[str, Path]:
    """Shards with features, by the type they are stored in."""
    folders = {dtype: tmp_path_factory.mktemp(dtype) for dtype in ("float16", "float32")}
    for dtype, folder in folders.items():
        encoder = FeatureEncoder(str(model), sizes=(128, 256), dtype=dtype, device="cpu")
        pack(read(raw), folder, size=128, records_per_shard=4, features=encoder, max_skipped=0.2)
    return folders


def models_of(model: Path) -> dict[str, torch.nn.Module]:
    return {
        "image_tokenizer": load_image_tokenizer(str(model)),
        "text_encoder": load_text_encoder(str(model), torch.float32)[1],
    }


@pytest.mark.parametrize("size", [128, 256])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 0.0), ("float16", 2e-3)])
def test_stored_features_give_the_losses_of_the_models(config, tmp_path, featured, dtype, tolerance, size):
    """float32: the very losses. float16: features rounded by 1 in 2,000, and few bits next to zero flip."""
    # Pair by pair, as they were packed: in a larger batch a convolution may round otherwise.
    changes = [f"data.source={featured[dtype]}", f"data.sizes={{{size}: 1}}", "steps=2", "micro_batch_size=1"]
    training = EditorTraining(config(*changes), CPU, tmp_path)
    losses = []
    with torch.no_grad():
        for number in range(5):
            stored = MicroBatches(training.plan, 1)[number]
            assert [len(features.text_TF) for features in stored.features] == [len(stored.instructions[0])]
            unseen = torch.zeros_like(stored.source_B3HW)  # nothing is taken from the pictures
            blind = dataclasses.replace(stored, source_B3HW=unseen, target_B3HW=unseen)
            online = dataclasses.replace(stored, features=[])
            losses.append([training.loss(batch)[0] for batch in (blind, online)])
            losses.append([training.validate(batch)["loss"] for batch in (blind, online)])
    ours, theirs = torch.tensor(losses).T
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=0)
    assert torch.equal(ours, theirs) == (not tolerance)


def test_features_change_no_picture(config, tmp_path, model, featured):
    settings = config(f"data.source={featured['float16']}", "steps=3")
    alone, used = (steps(settings, tmp_path / name, m) for name, m in (("alone", None), ("used", models_of(model))))
    assert all(same(a, b) for a, b in zip(alone, used))
    assert not any(batch.features for batch in alone) and all(batch.features for batch in used)


def test_features_of_other_models_or_sizes_are_refused(config, tmp_path, model, featured):
    settings = config(f"data.source={featured['float16']}")
    others = {"image_tokenizer": tiny_image_tokenizer(seed=1), "text_encoder": tiny_text_encoder(seed=1)[1]}
    for name, other in others.items():
        models = models_of(model) | {name: other}
        hashes = f"{model_sha256(models_of(model)[name])[:12]}.*{model_sha256(other)[:12]}"
        with pytest.raises(ValueError, match=f"are of the {name} {hashes}; pack again"):
            open_pairs(settings, CPU, tmp_path, models)
    for change, words in (("data.sizes={512: 1}", r"sizes \[128, 256\].*\[512\]"), ("data.fit=square", "fit native")):
        with pytest.raises(ValueError, match=f"are for .*{words}"):
            open_pairs(config(f"data.source={featured['float16']}", change), CPU, tmp_path, models_of(model))


def test_a_model_has_one_hash_in_either_precision(model):
    tokenizer, encoder = models_of(model).values()
    for module in (tokenizer, encoder):
        before = model_sha256(module)
        assert model_sha256(module.bfloat16()) == before
        with torch.no_grad():
            next(module.parameters()).view(-1)[0] += 1
        assert model_sha256(module) != before
    with_other_groups = tiny_image_tokenizer(num_groups=4)
    assert model_sha256(with_other_groups) != model_sha256(tiny_image_tokenizer())


def test_features_that_float16_cannot_hold_are_refused(model, raw):
    encoder = FeatureEncoder(str(model), sizes=(128,), device="cpu")
    with torch.no_grad():
        encoder.image_tokenizer.encoder.conv_out.bias += 1e6
    with pytest.raises(ValueError, match=r"features source\.128 of 'do 0' exceed torch\.float16: store float32"):
        encoder.encode(encoder.read(next(iter(read(raw)))), ["do 0"])


def test_the_command_packs_features(tmp_path, raw, model, capsys):
    arguments = ["data", "pack", str(raw), "--output", str(tmp_path / "out"), "--size=128", "--max-skipped=0.2"]
    for extra, code in (
        (["--features", str(model)], 0),
        (["--features", str(model)], 0),
        ([], 2),
        (["--feature-size=128"], 2),
    ):
        with pytest.raises(SystemExit) as caught:
            main([*arguments, *extra])
        assert caught.value.code == code, capsys.readouterr()
    printed = capsys.readouterr()
    assert "13 pairs" in printed.out and "checksums hold" in printed.out
    assert "was packed with" in printed.err and "--feature-size without --features" in printed.err
    facts = json.loads((tmp_path / "out" / "index.json").read_text())["features"]
    assert facts["sizes"] == [128] and facts["dtype"] == "float16"
    assert facts["image_tokenizer"] == model_sha256(models_of(model)["image_tokenizer"])
