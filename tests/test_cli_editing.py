"""varedit edit with a mask, batch, session and replay, run in process on a tiny model folder."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from varedit.editing.best_of import best_of
from varedit.editing.edit import apply_edit
from varedit.editing.manifest import read_manifest
from varedit.editing.mask import box_mask
from varedit.image_processor import load_image
from varedit.image_writer import encode_image
from varedit.pipeline import load_pipeline


@pytest.fixture(scope="module")
def model(model_folder):
    return ["--model", model_folder, "--device=cpu"]


@pytest.fixture
def photo(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    Image.fromarray(values).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


# -- edit


def test_an_edit_with_a_box_says_what_it_did_and_is_replayed(varedit, model, tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (600, 900, 3), np.uint8)
    Image.fromarray(values).save(tmp_path / "large.png")
    box = "--box=100,100,40,30"
    edit = ["edit", tmp_path / "large.png", "blur", "--seed=3", "--preserve=off", *model]
    ran = varedit(*edit, box, "--mask-margin=6")
    assert ran.code == 0 and re.search(r"edited by itself: the \d+ x \d+ pixels at \d+,\d+", ran.out), ran.err
    edited = np.asarray(load_image(tmp_path / "large.edited.png").rgb)
    inside = np.zeros((600, 900), bool)
    inside[94:136, 94:146] = True
    assert np.array_equal(edited[~inside], values[~inside]) and (edited != values)[94:100, 94:146].any()
    ran = varedit("replay", tmp_path / "large.edited.png", *model)
    assert ran.code == 0 and "bit for bit" in ran.out
    ran = varedit(*edit, box, "-o", tmp_path / "whole.png", "--crop=off", "--lock=two-pass")
    assert ran.code == 0 and "by itself" not in ran.out
    manifest = read_manifest(tmp_path / "whole.png")
    assert (manifest.settings.crop, manifest.settings.lock) == ("off", "two-pass")


def test_box_polygon_and_transparent_mask_name_the_same_area(varedit, model, tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    Image.fromarray(values).save(tmp_path / "small.png")
    hole = np.full((60, 90, 4), 255, np.uint8)
    hole[10:31, 20:51, 3] = 0
    Image.fromarray(hole).save(tmp_path / "hole.png")
    areas = {
        "box": ["--box=20,10,31,21"],
        "polygon": ["--polygon=20,10 50,10 50,30 20,30"],
        "mask": ["--mask", tmp_path / "hole.png", "--mask-convention=transparent"],
    }
    edited = {}
    for name, area in areas.items():
        edit = ["edit", tmp_path / "small.png", "blur", "--seed=3", "--strength=0.5", *model]
        assert varedit(*edit, *area, "-o", tmp_path / f"{name}.png").code == 0
        edited[name] = np.asarray(load_image(tmp_path / f"{name}.png").rgb)
        assert read_manifest(tmp_path / f"{name}.png").settings.strength == 0.5
    assert np.array_equal(edited["box"], edited["polygon"]) and np.array_equal(edited["box"], edited["mask"])
    assert (edited["box"] != values).any()


def test_polygons_and_transparent_masks_are_replayed(varedit, model, photo, tmp_path):
    hole = np.full((60, 90, 4), 255, np.uint8)
    hole[10:31, 20:51, 3] = 0
    hole[20:25, 30:35, 3] = 255  # no rectangle: a box would be recorded
    Image.fromarray(hole).save(tmp_path / "hole.png")
    areas = {
        "polygon": ["--polygon=20,10 50,10 40.5,40"],
        "hole": ["--mask", tmp_path / "hole.png", "--mask-convention=transparent"],
    }
    for name, area in areas.items():
        edited, again = tmp_path / f"{name}.edited.png", tmp_path / f"{name}.again.png"
        assert varedit("edit", photo, "blur", "--seed=3", *area, "-o", edited, *model).code == 0
        for file, more in ((edited, ["-o", again]), (again, [])):
            ran = varedit("replay", file, *more, *model)
            assert ran.code == 0 and "bit for bit" in ran.out, ran.out


def test_an_edit_that_changed_nothing_says_so(varedit, model, tmp_path):
    Image.new("RGB", (200, 10), "gray").save(tmp_path / "wide.png")
    ran = varedit("edit", tmp_path / "wide.png", "blur", "--seed=1", "--box=0,0,1,1", *model)
    assert ran.code == 0 and "\nno change; changed by 0.0 of 255 levels" in ran.out


def test_without_a_manifest_there_is_none(varedit, model, photo, tmp_path):
    for name in ("a.png", "a.tiff"):
        assert varedit("edit", photo, "blur", "--seed=3", "-o", tmp_path / name, "--no-manifest", *model).code == 0
        varedit("replay", tmp_path / name, *model).assert_refused("no manifest")
    side = tmp_path / "a.tiff.varedit.json"
    assert not side.exists()
    edit = ["edit", photo, "blur", "--seed=4", "-o", tmp_path / "a.tiff", *model]
    assert varedit(*edit, "--overwrite").code == 0 and side.exists()
    assert varedit(*edit, "--overwrite", "--no-manifest").code == 0 and not side.exists()


def test_a_turned_photo_is_edited_upright_and_keeps_its_exif(varedit, model, tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "on its side"
    values = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    Image.fromarray(values).save(tmp_path / "turned.jpg", exif=exif)
    ran = varedit("edit", tmp_path / "turned.jpg", "blur", "--seed=3", "--box=10,10,30,30", *model)
    assert ran.code == 0 and "60 x 90 pixels" in ran.out, ran.err
    with Image.open(tmp_path / "turned.edited.jpg") as image:
        assert image.size == (60, 90) and image.getexif().get(0x0112, 1) == 1
        assert image.getexif()[0x010E] == "on its side"
        edited = np.asarray(image, int)
    source = np.asarray(load_image(tmp_path / "turned.jpg").rgb, int)
    away = edited[50:] - source[50:]  # the box ends at 40
    assert np.abs(away).mean() < 5 < 20 < np.abs(edited[50:, ::-1] - source[50:]).mean()  # JPEG rounds
    assert varedit("replay", tmp_path / "turned.edited.jpg", *model).code == 0


def test_transparency_is_kept(varedit, model, tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (60, 90, 4), np.uint8)
    Image.fromarray(values).save(tmp_path / "clear.png")
    assert varedit("edit", tmp_path / "clear.png", "blur", "--seed=3", "--box=10,10,30,30", *model).code == 0
    with Image.open(tmp_path / "clear.edited.png") as image:
        edited = np.asarray(image)
    assert edited.shape == values.shape and np.array_equal(edited[..., 3], values[..., 3])
    assert np.array_equal(edited[:, 40:], values[:, 40:]) and (edited != values)[10:40, 10:40, :3].any()


def test_the_change_map_is_written_at_the_size_of_the_picture(varedit, model, model_folder, photo, tmp_path):
    drawn = tmp_path / "map.png"
    edit = ["edit", photo, "blur", "--seed=3", "--box=10,10,30,30", "--change-map", drawn, *model]
    assert varedit(*edit).code == 0
    result = apply_edit(
        load_pipeline(str(model_folder), "cpu"), photo, "blur", seed=3, mask=box_mask((10, 10, 30, 30), (90, 60))
    )
    with Image.open(drawn) as image:
        assert image.size == (90, 60) and image.tobytes() == result.change_map.draw(result.source.rgb).tobytes()
    drawn.write_bytes(b"precious")
    other = tmp_path / "other.png"
    varedit(*edit, "-o", other).assert_refused("map.png", "--overwrite")
    assert drawn.read_bytes() == b"precious" and not other.exists()
    assert varedit(*edit, "-o", other, "--overwrite").code == 0
    assert load_image(drawn).rgb.size == (90, 60)


def test_the_best_of_two_is_the_first_of_the_ranking(varedit, model, model_folder, photo, tmp_path):
    seed, pipeline = 0, load_pipeline(str(model_folder), "cpu")
    first, second = best_of(pipeline, photo, "blur", 2, seed=seed)
    assert first.result.seed != seed and first.result.image.tobytes() != second.result.image.tobytes()
    ran = varedit("edit", photo, "blur", f"--seed={seed}", "--best-of=2", *model)
    assert ran.code == 0 and f"seed {first.result.seed}\n" in ran.out
    assert load_image(tmp_path / "photo.edited.png").rgb.tobytes() == first.result.image.tobytes()
    seeds = [str(candidate.result.seed) for candidate in (first, second)]
    assert re.findall(r"^best \d: seed (\d+), evidence ", ran.err, re.MULTILINE) == seeds
    assert read_manifest(tmp_path / "photo.edited.png").seed == first.result.seed


def test_16_bits_stay_or_are_said_to_go(varedit, model, tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (60, 90, 3), np.uint16)
    (tmp_path / "deep.tiff").write_bytes(encode_image(values, "tiff"))
    edit = ["edit", tmp_path / "deep.tiff", "blur", "--seed=3", "--box=10,10,30,30", *model]
    ran = varedit(*edit)
    assert ran.code == 0 and "note:" not in ran.err
    deep = load_image(tmp_path / "deep.edited.tiff").rgb16_HW3
    assert np.array_equal(deep[:, 40:], values[:, 40:])
    ran = varedit(*edit, "-o", tmp_path / "shallow.jpg")
    assert ran.code == 0 and "note: JPEG holds 8 bits a channel" in ran.err
    for name in ("deep.edited.tiff", "shallow.jpg"):
        assert varedit("replay", tmp_path / name, *model).code == 0


def test_edit_refuses_before_the_model_is_loaded(varedit, photo, tmp_path):
    edit = ["edit", photo, "blur", "--model", "/nowhere"]
    Image.new("L", (60, 90), 255).save(tmp_path / "tall.png")
    Image.new("L", (90, 60)).save(tmp_path / "empty.png")
    varedit(*edit, "--mask", tmp_path / "tall.png").assert_refused("60 x 90", "90 x 60", "aspect")
    varedit(*edit, "--mask", tmp_path / "empty.png").assert_refused("empty")
    varedit(*edit, "--mask", tmp_path / "none.png").assert_refused("none.png", "does not exist")
    varedit(*edit, "--mask", tmp_path / "tall.png", "--box=1,1,2,2").assert_refused("--mask and --box")
    varedit(*edit, "--box=1,1,2,2", "--polygon=1,1 9,1 5,9").assert_refused("--box and --polygon")
    varedit(*edit, "--polygon=1,1 9,1").assert_refused("2 points")
    varedit(*edit, "--mask-convention=transparent").assert_refused("--mask-convention transparent", "--mask")
    varedit(*edit, "--strength=2").assert_refused("2.0", "between 0 and 1")
    varedit(*edit, "--strength=0.5", "--preserve=off").assert_refused("0.5", "preserve off")
    varedit(*edit, "--box=10,10,5").assert_refused("10,10,5", "X,Y,WIDTH,HEIGHT")
    varedit(*edit, "--box=10,10,5,-1").assert_refused("10,10,5,-1")
    varedit(*edit, "--box=1,1,9,9", "--mask-margin=-1").assert_refused("-1")
    varedit(*edit, "--mask-margin=4").assert_refused("--mask-margin 4", "--box")
    varedit(*edit, "--lock=tight").assert_refused("tight")
    varedit(*edit, "--crop=on").assert_refused("on")
    varedit(*edit, "--preserve=off", "--change-map", tmp_path / "map.png").assert_refused("--change-map")
    same = tmp_path / "same.png"
    varedit(*edit, "-o", same, "--change-map", same).assert_refused("same.png", "two files")
    around = tmp_path / ".." / tmp_path.name / "same.png"
    varedit(*edit, "-o", same, "--change-map", around).assert_refused("same.png", "two files")
    varedit(*edit, "--change-map", photo, "--overwrite").assert_refused("photo.png", "is an input")
    varedit(*edit, "-o", tmp_path / ("a" * 300 + ".png")).assert_refused("aaa.png")
    varedit(*edit, "--best-of=0").assert_refused("best of 0", "64")
    varedit(*edit, "--box=inf,1,2,2").assert_refused("inf,1,2,2", "X,Y,WIDTH,HEIGHT")
    (tmp_path / "a.tiff.varedit.json").write_text("precious")
    for more in ([], ["--no-manifest"]):
        varedit(*edit, *more, "-o", tmp_path / "a.tiff").assert_refused("a.tiff.varedit.json", "exists already")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.tiff.varedit.json", "empty.png", "photo.png", "tall.png",
    ]  # fmt: skip


# -- session


def test_a_session_from_new_to_export(varedit, model, photo, tmp_path):
    folder = tmp_path / "session"
    ran = varedit("session", "new", folder, photo)
    assert ran.code == 0 and "90 x 60" in ran.out
    ran = varedit(
        "session",
        "edit",
        folder,
        "paint it [bold]red[/]",
        "--box=10,10,30,30",
        "--seed=7",
        "--preserve=off",
        "--lock=mask",
        *model,
    )
    assert ran.code == 0 and "step 1 from 0, seed 7" in ran.out and len(re.findall("^scale ", ran.err, re.M)) == 5
    assert varedit("session", "undo", folder).out.endswith("at step 0\n")
    Image.fromarray(np.full((60, 90), 255, np.uint8)).save(tmp_path / "mask.png")
    ran = varedit("session", "edit", folder, "blur", "--mask", tmp_path / "mask.png", *model)
    assert ran.code == 0 and "step 2 from 0" in ran.out
    assert varedit("session", "branch", folder, 1).code == 0
    log = varedit("session", "log", folder).out
    assert "photo.png" in log and "* 1  paint it [bold]red[/]  (seed 7)" in log and "  2  blur" in log
    shown = json.loads(varedit("session", "show", folder).out)
    assert (shown["step"], shown["parent"], shown["path"]) == (1, 0, [0, 1]) and len(shown["files"]) == 3
    assert json.loads(varedit("session", "show", folder, "--step=0").out)["manifest"] is None
    assert varedit("session", "export", folder, tmp_path / "out.png").code == 0
    before, after = (np.asarray(load_image(path).rgb) for path in (photo, tmp_path / "out.png"))
    changed = (before != after).any(-1)
    assert changed[10:40, 10:40].any() and not changed[:, 40:].any() and not changed[40:].any()

    ran = varedit("replay", folder, *model)
    assert ran.code == 0 and ran.out == "step 1: the same picture\nstep 2: the same picture\n"
    ran = varedit("replay", tmp_path / "out.png", *model)  # the box is in the manifest, the input beside the file
    assert ran.code == 0, ran.out
    varedit("session", "export", folder, tmp_path / "out.png").assert_refused("exists already")
    varedit("session", "export", folder, tmp_path / "b.png", "--step=9").assert_refused("no step 9")
    for inside in ("original.png", "steps/0001/result.png"):
        ran = varedit("session", "export", folder, folder / inside, "--overwrite")
        ran.assert_refused(inside, "session's own folder")
    (folder / "session.json").write_text("{")
    varedit("session", "log", folder).assert_refused("session.json", "damaged")


def test_session_refuses_before_the_model_is_loaded(varedit, photo, tmp_path):
    folder = tmp_path / "session"
    varedit("session", "new", folder, tmp_path / "none.png").assert_refused("none.png")
    assert varedit("session", "new", folder, photo).code == 0
    varedit("session", "new", folder, photo).assert_refused("exists already")
    edit = ["session", "edit", folder, "--model", "/nowhere"]
    varedit(*edit, " ").assert_refused("empty")
    varedit(*edit, "x", "--seed=-1").assert_refused("-1")
    varedit(*edit, "x", "--box=1,2,3").assert_refused("1,2,3")
    varedit(*edit, "x", "--box=500,2,3,3").assert_refused("covers no pixel")
    varedit(*edit, "x", "--box=1,2,3,3", "--mask", photo).assert_refused("--mask and --box")
    Image.new("L", (60, 90), 255).save(tmp_path / "tall.png")
    varedit(*edit, "x", "--mask", tmp_path / "tall.png").assert_refused("aspect")
    Image.new("L", (90, 60)).save(tmp_path / "empty.png")
    varedit(*edit, "x", "--mask", tmp_path / "empty.png").assert_refused("empty")
    varedit(*edit, "x", "--size=100").assert_refused("100")
    varedit(*edit, "x").assert_refused("/nowhere")
    varedit("session", "undo", folder).assert_refused("nothing to undo")
    varedit("session", "log", tmp_path / "none").assert_refused("no session")
    varedit("session", "log", tmp_path / ("s" * 300)).assert_refused("no session")
    varedit("session", "new", tmp_path / ("s" * 300), photo).assert_refused("sss", "name another")
    varedit("replay", folder).assert_refused("no steps")


# -- batch and replay


def test_batch_exit_codes_record_and_replay(varedit, model, photo, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "jobs.csv").write_text("image,instruction\nphoto.png,blur\nnone.png,blur\n")
    batch = ["batch", tmp_path / "jobs.csv", "-o", out, *model]
    ran = varedit(*batch)
    assert ran.code == 3 and "1 edited, 1 failed" in ran.out
    assert "failed: line 3, none.edited.png" in ran.err and "does not exist" in ran.err
    varedit(*batch).assert_refused("--resume")
    photo.with_name("none.png").write_bytes(photo.read_bytes())
    ran = varedit(*batch, "--resume")
    assert ran.code == 0 and "1 edited, 0 failed, 1 were done before" in ran.out
    ran = varedit(*batch, "--resume")
    assert ran.code == 0 and "0 edited, 0 failed, 2 were done before" in ran.out
    results = out / "results.jsonl"
    varedit("batch", results, "-o", out, "--overwrite", *model).assert_refused("would replace the list")
    assert results.exists()

    first = out / "photo.edited.png"
    varedit("replay", first, *model).assert_refused("'photo.png' is not beside it", "--input")
    again = tmp_path / "again.png"
    ran = varedit("replay", first, "--input", photo, "-o", again, *model)
    assert ran.code == 0 and "bit for bit" in ran.out
    assert again.read_bytes() == first.read_bytes()
    varedit("replay", first, "--input", photo, "-o", again, *model).assert_refused("exists already")

    Image.new("RGB", (90, 60), "red").save(tmp_path / "red.png")
    ran = varedit("replay", first, "--input", tmp_path / "red.png", *model)
    assert ran.code == 1 and "  input: " in ran.out
    with Image.open(first) as image:  # saved again by a program that keeps metadata but not pixels
        xmp = image.info["xmp"]
    Image.new("RGB", (90, 60), "red").save(tmp_path / "fake.jpg", xmp=xmp)
    ran = varedit("replay", tmp_path / "fake.jpg", *model)
    assert ran.code == 1 and "  file: fake.jpg" in ran.out


def test_the_settings_of_a_batch_are_those_asked_for(varedit, model, photo, tmp_path):
    Image.new("L", (90, 60), 255).save(tmp_path / "mask.png")
    (tmp_path / "jobs.csv").write_text("image,instruction,mask\nphoto.png,blur,mask.png\n")
    asked = {
        "guidance_scale": 2.5, "temperature": 0.25, "top_p": 0.75, "size": 256, "fit": "square", "preserve": "blend",
        "strength": 0.5, "lock": "off", "mask_margin": 4, "crop": "off",
    }  # fmt: skip
    given = [f"--{name.replace('_', '-')}={value}" for name, value in asked.items()]
    batch = ["batch", tmp_path / "jobs.csv", "-o", tmp_path / "out", "--seed=7", "--batch-size=2", *given, *model]
    ran = varedit(*batch)
    assert ran.code == 0 and "1 edited, 0 failed" in ran.out, ran.err
    (record,) = map(json.loads, (tmp_path / "out" / "results.jsonl").read_text().splitlines())
    assert record["settings"].items() >= asked.items() and (record["seed"], record["status"]) == (7, "ok")
    manifest = read_manifest(tmp_path / "out" / "photo.edited.png")
    assert manifest.settings.to_json() == record["settings"] and manifest.seed == 7
    edit = ["edit", photo, "blur", "--seed=7", "--mask", tmp_path / "mask.png", "-o", tmp_path / "single.png"]
    assert varedit(*edit, *given, *model).code == 0
    assert (tmp_path / "single.png").read_bytes() == (tmp_path / "out" / "photo.edited.png").read_bytes()


def test_replay_names_another_model(varedit, model, photo, tmp_path):
    from varedit.testing import tiny_pipeline

    assert varedit("session", "new", tmp_path / "s", photo).code == 0
    assert varedit("session", "edit", tmp_path / "s", "x", "--seed=1", "--guidance-scale=1", *model).code == 0
    tiny_pipeline(seed=1).save_pretrained(tmp_path / "other")
    ran = varedit("replay", tmp_path / "s", "--model", tmp_path / "other")
    assert ran.code == 1 and ran.out.startswith("step 1: model: other")
    result = tmp_path / "s" / "steps" / "0001" / "result.png"
    ran = varedit("replay", result, "--input", photo, "--model", tmp_path / "other")
    assert ran.code == 1 and "  model: other" in ran.out


def test_replay_and_batch_refuse(varedit, photo, tmp_path):
    varedit("replay", photo).assert_refused("no manifest")
    varedit("replay", tmp_path / "none.png").assert_refused("does not exist")
    varedit("replay", tmp_path / ("a" * 300 + ".png")).assert_refused("aaa.png")
    photo.with_name("photo.png.varedit.json").write_text('{"format": "varedit/1"}')
    varedit("replay", photo).assert_refused("damaged")
    varedit("replay", tmp_path, "--input", photo).assert_refused("a session has its own inputs")
    varedit("batch", tmp_path / "none.csv", "-o", tmp_path / "o").assert_refused("none.csv")
    varedit("batch", tmp_path, "-o", tmp_path / "o").assert_refused("--instruction")
    common = ["batch", tmp_path, "-o", tmp_path / "o", "--instruction=x"]
    varedit(*common, "--mask-convention=transparent").assert_refused("--mask-convention transparent", "no job")
    varedit(*common, "--mask-margin=4").assert_refused("--mask-margin 4", "no job")
    varedit(*common, "--workers=0").assert_refused("num_workers 0")
    varedit(*common, "--size=5").assert_refused("size 5")
    varedit(*common, "--model", "/nowhere").assert_refused("/nowhere")


def test_without_ray_one_line_says_so(varedit, photo, tmp_path):
    import importlib.util

    if importlib.util.find_spec("ray"):
        pytest.skip("Ray is installed")
    ran = varedit("batch", photo.parent, "-o", tmp_path / "o", "--instruction=x", "--ray")
    ran.assert_refused("--ray", "ray[data]")
    assert not (tmp_path / "o").exists()
