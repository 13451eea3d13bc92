"""Manifests in and beside files, the identity of weights, replays."""

import io
import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from varedit.editing.edit import EditRequest, Settings, apply_edit, apply_edits
from varedit.editing.manifest import (
    SOURCE_TYPE,
    Manifest,
    check_side_file,
    embed,
    make_manifest,
    pixels_sha256,
    read_manifest,
    save_with_manifest,
    side_file,
)
from varedit.editing.mask import box_mask
from varedit.editing.model_identity import folder_sha256, identify, identify_folder, state_sha256
from varedit.editing.replay import check_file, check_model, replay
from varedit.image_processor import ImageError, load_image
from varedit.image_writer import encode_image, save_image
from varedit.pipeline import VAREditPipeline, load_pipeline
from varedit.testing import tiny_pipeline, tiny_transformer

SIZE = (90, 60)
MASK = box_mask((12, 8, 40, 30), SIZE)


@pytest.fixture(scope="module")
def pipeline(model_folder):
    return load_pipeline(model_folder, "cpu")


@pytest.fixture(scope="module")
def picture():
    values = np.random.default_rng(0).integers(0, 256, (60, 90, 4), np.uint8)
    return load_image(Image.fromarray(values))  # with alpha


SETTINGS = Settings(preserve="off")  # a random model, held by the mask, does nothing that is worth preserving


@pytest.fixture(scope="module")
def edit(pipeline, picture):
    return apply_edit(pipeline, picture, 'make it <red> & "gröen" 🎈', seed=5, settings=SETTINGS, mask=MASK)


@pytest.fixture(scope="module")
def manifest(edit, pipeline):
    return make_manifest(edit, pipeline, input_name="/somewhere/photo.png", mask_name="mask.png")


# -- one edit


def test_a_batch_of_edits_equals_single_ones(pipeline, picture, edit):
    requests = [EditRequest(picture, "blur", 1), EditRequest(picture, edit.prompt, 5, MASK)]
    together = apply_edits(pipeline, requests, SETTINGS)
    assert together[1].image.tobytes() == edit.image.tobytes()
    assert all(torch.equal(*pair) for pair in zip(together[1].bits, edit.bits, strict=True))


def test_without_preservation_an_edit_is_the_pipelines_own(pipeline, picture):
    ours = apply_edit(pipeline, picture, "blur", seed=3, settings=Settings(preserve="off"))
    theirs = pipeline(picture, "blur", seed=3)
    assert ours.image.tobytes() == theirs.images[0].tobytes()
    assert ours.change_map is None and ours.seed == theirs.seeds[0]


def test_outside_the_mask_an_edit_is_its_input(edit, picture):
    outside = np.asarray(MASK) == 0
    assert (np.asarray(edit.image)[outside] == np.asarray(picture.rgb)[outside]).all()


def test_settings_travel_as_json(edit):
    assert Settings.from_json(json.loads(json.dumps(edit.settings.to_json()))) == edit.settings
    for values, named in [
        ({"sparkle": 1}, "sparkle"), ({"size": "big"}, "size"), ({"size": 100}, "100"), ({"fit": "wide"}, "wide"),
        ({"preserve": "maybe"}, "maybe"), ({"calibration": {"floor": "x"}}, "calibration"), ([], "settings"),
        ({"guidance_scale": -1}, "-1"), ({"strength": 2}, "2"), ({"strength": None}, "strength"),
        ({"mask_margin": None}, "mask_margin"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=named):
            Settings.from_json(values)


def test_a_mask_of_another_size_is_refused(pipeline, picture):
    with pytest.raises(ValueError, match="10 x 10"):
        apply_edit(pipeline, picture, "blur", mask=Image.new("L", (10, 10), 255))


# -- in and beside files


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tiff", ".bmp", ".avif"])
def test_manifest_travels_with_every_format(suffix, tmp_path, edit, manifest):
    path = save_with_manifest(edit.image, tmp_path / f"a{suffix}", manifest, edit.source)
    assert read_manifest(path) == manifest
    inside = suffix in (".png", ".jpg", ".webp")
    assert side_file(path).exists() is not inside
    if inside:
        assert SOURCE_TYPE.encode() in path.read_bytes()
    else:
        assert read_manifest(side_file(path)) == manifest
    plain = load_image(encode_image(edit.image, suffix, edit.source))
    written = load_image(path)
    assert written.rgb.tobytes() == plain.rgb.tobytes()
    assert (written.alpha is None) == (plain.alpha is None)
    if plain.alpha:
        assert written.alpha.tobytes() == plain.alpha.tobytes()


@pytest.mark.parametrize("format", ["jpeg", "webp", "png"])
def test_exif_stays_readable_beside_the_manifest(format, manifest):
    exif = Image.Exif()
    exif[0x010E] = "a description"
    buffer = io.BytesIO()
    Image.new("RGB", (5, 3)).save(buffer, "JPEG", exif=exif)
    source = load_image(buffer.getvalue())
    data = embed(encode_image(source.rgb, format, source), manifest)
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        assert image.getexif()[0x010E] == "a description" and image.size == (5, 3)


def test_writing_an_edit_twice_gives_the_same_bytes(tmp_path, edit, manifest, pipeline):
    again = apply_edit(pipeline, edit.source, edit.prompt, seed=5, settings=SETTINGS, mask=MASK)
    second = make_manifest(again, pipeline, input_name="photo.png", mask_name="mask.png")
    first = save_with_manifest(edit.image, tmp_path / "a.png", manifest, edit.source)
    other = save_with_manifest(again.image, tmp_path / "b.png", second, again.source)
    assert first.read_bytes() == other.read_bytes()


def test_too_long_for_a_jpeg_goes_beside_it(tmp_path, edit, manifest):
    long = replace(manifest, change={"note": "x" * 70_000})
    path = save_with_manifest(edit.image, tmp_path / "a.jpg", long)
    assert side_file(path).exists() and read_manifest(path) == long


def test_nothing_is_overwritten_unasked(tmp_path, edit, manifest):
    path = save_with_manifest(edit.image, tmp_path / "a.tiff", manifest)
    path.unlink()
    kept = side_file(path).read_bytes()
    with pytest.raises(ImageError, match="exists already"):
        save_with_manifest(edit.image, path, replace(manifest, seed=6))
    assert side_file(path).read_bytes() == kept and not path.exists()
    save_with_manifest(edit.image, path, replace(manifest, seed=6), overwrite=True)
    assert read_manifest(path).seed == 6
    assert [item.name for item in tmp_path.iterdir() if item.name.startswith(".")] == []
    side_file(tmp_path / "b.bmp").mkdir()
    with pytest.raises(ImageError, match="is a folder"):
        check_side_file(tmp_path / "b.bmp", overwrite=True)


def test_a_disk_full_leaves_the_old_picture_and_its_manifest(tmp_path, edit, manifest, monkeypatch):
    path = save_with_manifest(edit.image, tmp_path / "a.tiff", manifest)
    before = {item: item.read_bytes() for item in tmp_path.iterdir()}
    written, fsync = [], os.fsync

    def full_at_the_second(descriptor):
        written.append(descriptor)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full_at_the_second)
    with pytest.raises(ImageError, match=r"a\.tiff' cannot be written \(No space left"):
        save_with_manifest(Image.new("RGB", SIZE), path, replace(manifest, seed=6), overwrite=True)
    assert {item: item.read_bytes() for item in tmp_path.iterdir()} == before and len(before) == 2


def test_a_name_too_long_for_a_side_file_has_none(tmp_path):
    path = save_image(Image.new("RGB", (4, 4)), tmp_path / ("a" * 246 + ".png"))
    assert read_manifest(path) is None


def test_pictures_without_manifest_and_strangers_metadata(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    assert read_manifest(tmp_path / "a.png") is None
    for index, packet in enumerate([b"<x:xmp", b'<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>', b"<a/>"]):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{index}.jpg", xmp=packet)
        assert read_manifest(tmp_path / f"{index}.jpg") is None
    with pytest.raises(ImageError, match="does not exist"):
        read_manifest(tmp_path / "none.png")
    with pytest.raises(ValueError, match="cannot be read"):
        read_manifest(tmp_path / "none.varedit.json")


def test_manifest_rewritten_as_an_attribute_is_still_found(tmp_path, manifest):
    from xml.sax.saxutils import quoteattr

    text = quoteattr(json.dumps(manifest.to_json()))
    packet = f'<a xmlns:v="urn:varedit:1.0/"><b v:manifest={text}/></a>'.encode()
    Image.new("RGB", (4, 4)).save(tmp_path / "a.jpg", xmp=packet)
    assert read_manifest(tmp_path / "a.jpg") == manifest


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"format": "varedit/9"}, "varedit/9"), ({"seed": "5"}, "seed"), ({"seed": -1}, "seed"),
        ({"instruction": " "}, "instruction"), ({"settings": None}, "settings"), ({"input": {}}, "input"),
        ({"output": None}, "output"), ({"model": {"sha256": "a"}}, "model"), ({"mask": {}}, "mask"),
        ({"software": 3}, "software"), ({"input": {"sha256": "a", "name": 5}}, "name 5"),
        ({"mask": {"sha256": "a", "name": []}}, "mask has"), ({"device": {"dtype": []}}, "dtype"),
        ({"output": {"sha256": "a", "sha256_16": 5}}, "sha256_16 5"),
        ({"model": {"kind": "files", "sha256": "a", "configs": ["a"]}}, "configs"),
    ],
)  # fmt: skip
def test_damaged_manifests_are_named(change, named, manifest, tmp_path):
    with pytest.raises(ValueError, match=named):
        Manifest.from_json(manifest.to_json() | change)
    side = tmp_path / "a.bmp.varedit.json"
    side.write_text(json.dumps(manifest.to_json())[:-5])
    with pytest.raises(ValueError, match=r"a\.bmp\.varedit\.json.*no JSON"):
        read_manifest(side)


def test_manifest_tells_no_folders_and_says_ai(manifest, model_folder):
    text = json.dumps(manifest.to_json())
    assert "/" not in manifest.input["name"] and str(model_folder.parent) not in text and "somewhere" not in text
    assert "edited by AI" in text
    assert manifest.mask["box"] == [12, 8, 40, 30]


# -- hashes


def test_pixel_hash_is_of_size_and_pixels(picture):
    assert pixels_sha256(picture.rgb) == pixels_sha256(picture.rgb.copy())
    assert pixels_sha256(Image.new("RGB", (2, 3))) != pixels_sha256(Image.new("RGB", (3, 2)))
    tall = Image.new("L", (3000, 2000), 7)  # more than one band
    other = tall.copy()
    other.putpixel((2999, 1999), 8)
    assert pixels_sha256(tall) != pixels_sha256(other)


def test_weights_are_hashed_once_and_by_content(tmp_path):
    from varedit.editing import model_identity

    file = tmp_path / "part" / "a.safetensors"
    file.parent.mkdir()
    file.write_bytes(b"1234")
    first = folder_sha256(tmp_path)
    times = file.stat().st_mtime_ns
    file.write_bytes(b"5678")
    os.utime(file, ns=(times, times))
    model_identity._known.clear()  # another process
    assert folder_sha256(tmp_path) == first  # same time, same size: remembered
    os.utime(file, ns=(times + 10**9, times + 10**9))
    assert folder_sha256(tmp_path) != first


def test_identity_of_models(model_folder, pipeline):
    assert identify(pipeline) == identify_folder(model_folder)
    assert identify(pipeline).kind == "files"
    assert identify_folder(model_folder / "nowhere") is None
    memory = tiny_pipeline()
    assert identify(memory).kind == "memory"
    assert state_sha256(memory) == state_sha256(pipeline)
    with torch.no_grad():
        memory.transformer.head.bias[0] += 1
    assert state_sha256(memory) != state_sha256(pipeline)


@pytest.fixture
def changed_folder(model_folder, tmp_path):
    """A copy of the model with changed values in one of its JSON files: (file, values) -> folder."""
    folder = tmp_path / "changed"
    shutil.copytree(model_folder, folder)

    def change(file, values):
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
        return folder

    return change


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("transformer/config.json", {"position_layout": "fixed_offset"}),
        ("image_tokenizer/config.json", {"num_groups": 4}),
        ("text_encoder/config.json", {"relative_attention_max_distance": 7}),
        ("tokenizer/tokenizer.json", {"normalizer": {"type": "Lowercase"}}),
    ],
)
def test_another_configuration_is_another_model(file, values, changed_folder, manifest):
    part = file.split("/")[0]
    other = identify_folder(changed_folder(file, values))
    assert other.sha256 == manifest.model["sha256"]
    assert check_model(manifest, other)[0].endswith(f"the weights of the edit, but another configuration of {part}")
    older = replace(manifest, model={name: manifest.model[name] for name in ("name", "kind", "sha256")})
    assert check_model(older, other) == []  # it said the weights only


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("model_index.json", {"guidance_scale": 9.0}),  # in the settings of every edit
        ("transformer/config.json", {"_diffusers_version": "9.0", "_name_or_path": "/elsewhere"}),
        ("text_encoder/config.json", {"transformers_version": "9.0", "dtype": "bfloat16"}),
        ("tokenizer/tokenizer.json", {"padding": None, "truncation": {"max_length": 3}}),
    ],
)
def test_what_saving_notes_is_no_configuration(file, values, changed_folder, manifest):
    assert check_model(manifest, identify_folder(changed_folder(file, values))) == []


def test_configurations_in_memory_are_those_of_files(pipeline, picture, tmp_path):
    memory = tiny_pipeline()
    assert identify(memory).configs == identify(pipeline).configs
    pipeline.save_pretrained(tmp_path / "again")
    assert replace(identify_folder(tmp_path / "again"), name="") == replace(identify(pipeline), name="")

    result = apply_edit(memory, picture, "blur", seed=1, settings=Settings(preserve="off"))
    manifest = make_manifest(result, memory)
    other = tiny_pipeline(position_layout="fixed_offset")
    assert state_sha256(other) == state_sha256(memory)
    assert replay(manifest, picture, other).differences[0].endswith("another configuration of transformer")


def test_a_component_from_elsewhere_is_not_the_folders(model_folder, pipeline):
    mixed = VAREditPipeline.from_pretrained(model_folder, transformer=tiny_transformer(1))
    assert identify(mixed).kind == "memory" and identify(pipeline).kind == "files"


def test_how_strongly_an_adapter_acts_belongs_to_the_model(model_folder):
    pytest.importorskip("peft")
    from varedit.lora import add_lora, stack_lora

    adapted = load_pipeline(model_folder, "cpu")
    add_lora(adapted.transformer, 2, 4)
    full = identify(adapted)
    stack_lora(adapted, {"default": 0.5})
    half = identify(adapted)
    assert full.kind == half.kind == "memory" and full.sha256 == half.sha256 and full.configs != half.configs


# -- replays


def test_replay_makes_the_same_bits(manifest, edit, pipeline, tmp_path):
    path = save_with_manifest(edit.image, tmp_path / "a.jpg", manifest, edit.source)
    done = replay(read_manifest(path), edit.source, pipeline, MASK)
    assert done.same and done.notes == () and done.result.image.tobytes() == edit.image.tobytes()
    assert check_file(path, done.result) == []
    Image.open(path).convert("L").save(path)
    assert check_file(path, done.result)[0].startswith("file:")


def test_replay_says_what_differs(manifest, edit, pipeline, model_folder, tmp_path):
    other = load_image(edit.source.rgb.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    done = replay(manifest, other, pipeline)
    assert [text.split(":")[0] for text in done.differences] == ["input", "mask"] and done.result is None

    tiny_pipeline(seed=1).save_pretrained(tmp_path / "other")
    assert check_model(manifest, identify_folder(model_folder)) == []
    assert check_model(manifest, identify_folder(tmp_path / "other"))[0].startswith("model:")

    loose = replace(manifest, settings=replace(manifest.settings, size=None))
    assert replay(loose, edit.source, pipeline, MASK).differences[0].startswith("settings:")

    older = replace(
        manifest,
        output=manifest.output | {"sha256": "0" * 64},
        software=manifest.software | {"torch": "2.0"},
    )
    done = replay(older, edit.source, pipeline, MASK)
    assert done.differences[0].startswith("pixels:") and "the same bits" in done.differences[0]
    assert len(done.notes) == 1 and "torch" in done.notes[0] and "2.0" in done.notes[0]


def test_replay_of_a_model_from_memory(picture):
    memory = tiny_pipeline()
    result = apply_edit(memory, picture, "blur", seed=1, settings=Settings(preserve="off"))
    manifest = make_manifest(result, memory)
    assert replay(manifest, picture, memory).same
    with torch.no_grad():
        memory.transformer.head.bias[0] += 1
    assert replay(manifest, picture, memory).differences[0].startswith("model:")


# -- replays of files made elsewhere or on another day


@pytest.fixture
def replayed(varedit, pipeline, model_folder, edit, manifest, tmp_path):
    """Replay the command's file after its manifest was edited: (values to change) -> what came of it."""
    save_image(edit.source.rgb, tmp_path / "photo.png", edit.source)

    def run(**changes):
        values = manifest.to_json()
        for name, value in changes.items():
            values[name] = values[name] | value if isinstance(value, dict) else value
        side = tmp_path / "edited.bmp.varedit.json"
        side.write_text(json.dumps(values))
        save_image(edit.image, tmp_path / "edited.bmp", edit.source, overwrite=True)
        return varedit("replay", tmp_path / "edited.bmp", "--model", model_folder, "--device=cpu")

    return run


def test_a_file_of_an_earlier_version_replays(replayed):
    ran = replayed(software={"varedit": "0.0.1", "torch": "2.6.0"})
    assert ran.code == 0 and "the same picture, bit for bit" in ran.out
    assert "version: varedit is 0." in ran.out and "was 0.0.1" in ran.out and "was 2.6.0" in ran.out


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": {"sha256": "0" * 64, "name": "my_model"}}, ["model: ", "by my_model with 000000000000"]),
        ({"input": {"sha256": "0" * 64, "width": 10}}, ["input: 90 x 60 pixels", "10 x 60", "000000000000"]),
        ({"mask": {"sha256": "0" * 64}}, ["mask: ", "000000000000"]),
        ({"settings": {"size": None}}, ["settings: "]),
        ({"settings": {"temperature": 3.0}}, ["pixels: the edit came out different in the model's bits"]),
        ({"instruction": "blur"}, ["pixels: the edit came out different in the model's bits"]),
        ({"seed": 6}, ["pixels: the edit came out different in the model's bits"]),
        ({"settings": {"preserve": "exact"}}, ["pixels: ", "the model chose the same bits"]),
        ({"seed": 6, "software": {"varedit": "0.0.1"}}, ["pixels: ", "version: varedit", "was 0.0.1"]),
        ({"seed": 6, "device": {"threads": 999}}, ["pixels: ", "threads: ", "was 999; set OMP_NUM_THREADS=999"]),
        ({"model": {"configs": {"transformer": "0" * 64}}}, ["model: ", "another configuration of image_tokenizer, "]),
    ],
)
def test_an_edited_manifest_says_exactly_what_differs(changes, named, replayed):
    ran = replayed(**changes)
    assert ran.code == 1 and "edited.bmp: differs\n" in ran.out, ran
    for text in named:
        assert text in ran.out


def test_another_number_of_threads_is_told_where_the_picture_differs(replayed, manifest):
    assert manifest.device["threads"] == torch.get_num_threads()
    ran = replayed(device={"threads": 999})
    assert ran.code == 0 and "threads: " not in ran.out
    ran = replayed(seed=6, device={"threads": None})  # by an earlier version
    assert ran.code == 1 and "threads: " not in ran.out


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"settings": {"sparkle": 1}}, "'sparkle' is unknown to this version"),
        ({"settings": {"guidance_scale": -1}}, "guidance_scale -1"),
        ({"format": "varedit/2"}, "'varedit/2'"),
        ({"instruction": ""}, "is empty"),
        ({"software": 1}, "software"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_refused(changes, named, replayed):
    replayed(**changes).assert_refused("edited.bmp.varedit.json", named)


def test_a_model_from_memory_is_told_apart(replayed):
    ran = replayed(model={"kind": "memory", "sha256": "0" * 64})
    assert ran.code == 1 and "model: " in ran.out and "came from memory" in ran.out
