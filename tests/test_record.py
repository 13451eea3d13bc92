"""Records and the folder format: what is written is read back, whole or not at all."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from varedit.data.faults import image_hw, pixels_of
from varedit.data.record import INDEX, Encoded, Record, read_folder, write_folder


def record(number: int, **changes: object) -> Record:
    pixels = np.random.default_rng(number).integers(0, 256, (2, 24, 32, 3), np.uint8)
    mask = np.zeros((24, 32), bool)
    mask[3:9, 5:20] = True
    values: dict = {
        "source": pixels[0],
        "target": pixels[1],
        "instructions": (f"make it {number}", "mach es größer"),
        "mask": mask,
        "edit_type": "recolour",
        "origin": f"test {number}",
        "licence": "CC0 1.0",
        "extra": {"source_caption": "a dog", "held_out": ["object"], "scene": {"objects": []}},
    }
    return Record(**(values | changes))


def test_a_folder_gives_back_what_was_written(tmp_path: Path) -> None:
    written = [record(0), record(1, mask=None, extra={}), record(2)]
    assert write_folder(iter(written), tmp_path / "pairs") == 3
    found = list(read_folder(tmp_path / "pairs"))
    assert len(found) == 3
    for before, after in zip(written, found):
        source, target, mask = after.arrays()
        assert np.array_equal(source, before.source)
        assert np.array_equal(target, before.target)
        assert (mask is None) == (before.mask is None)
        if mask is not None:
            assert mask.dtype == bool
            assert np.array_equal(mask, before.mask)
        assert after.instruction == before.instructions[0]
        assert after.instructions == before.instructions
        assert (after.edit_type, after.origin, after.licence) == (before.edit_type, before.origin, before.licence)
        assert after.extra == before.extra


def test_records_read_can_be_written_again(tmp_path: Path) -> None:
    write_folder([record(4)], tmp_path / "a")
    write_folder(read_folder(tmp_path / "a"), tmp_path / "b")
    assert (tmp_path / "a" / INDEX).read_bytes() == (tmp_path / "b" / INDEX).read_bytes()
    again = next(read_folder(tmp_path / "b"))
    assert np.array_equal(again.arrays()[0], record(4).source)


def test_an_interrupted_folder_has_no_index_and_can_be_written_again(tmp_path: Path) -> None:
    def broken() -> Iterator[Record]:
        yield record(0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(broken(), tmp_path)
    assert not (tmp_path / INDEX).exists()
    with pytest.raises(ValueError, match="no readable pairs.jsonl"):
        next(read_folder(tmp_path))
    assert write_folder([record(0), record(1)], tmp_path) == 2


def test_a_complete_folder_is_never_overwritten(tmp_path: Path) -> None:
    write_folder([record(0)], tmp_path)
    before = (tmp_path / INDEX).read_bytes()
    with pytest.raises(ValueError, match="exists: choose another folder"):
        write_folder([record(1)], tmp_path)
    assert (tmp_path / INDEX).read_bytes() == before


def test_no_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no records"):
        write_folder([], tmp_path)
    assert not (tmp_path / INDEX).exists()


@pytest.mark.parametrize(
    "row",
    [
        "not json",
        '{"source": "a.png"}',
        '{"source": "a.png", "target": "b.png", "instructions": "one text"}',
        '{"source": "a.png", "target": "b.png", "instructions": []}',
        '{"source": "/etc/passwd", "target": "b.png", "instructions": ["x"]}',
        '{"source": "a.png", "target": "../../b.png", "instructions": ["x"]}',
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, row: str) -> None:
    good = {"source": "a.png", "target": "b.png", "instructions": ["x"]}
    (tmp_path / INDEX).write_text(json.dumps(good) + "\n\n" + row + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 3 is no record"):
        list(read_folder(tmp_path))


def test_a_missing_picture_is_named(tmp_path: Path) -> None:
    write_folder([record(0)], tmp_path)
    (found,) = read_folder(tmp_path)
    assert isinstance(found.target, Path)
    found.target.unlink()
    with pytest.raises(ValueError, match="0000000_target.png cannot be read"):
        found.arrays()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright(tmp_path: Path, orientation: int) -> None:
    """However a camera was held: the stored pixels are turned as the EXIF tag says, and the mask with its own tag."""
    shown = record(0)
    # What is stored so that the tag's turn gives the picture back: the inverse of that turn.
    turns = {2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]}.get(orientation, [])
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    for name in ("source", "target", "mask"):
        stored = Image.fromarray(getattr(shown, name))
        for turn in turns:
            stored = stored.transpose(Image.Transpose(turn))
        stored.save(tmp_path / f"{name}.png", exif=exif)
    files = {name: tmp_path / f"{name}.png" for name in ("source", "target", "mask")}
    for pictures in (files, {name: Encoded(path.read_bytes(), name) for name, path in files.items()}):
        found = record(0, **pictures)
        assert all(np.array_equal(a, b) for a, b in zip(found.arrays(), shown.arrays()))
        assert image_hw(found.source) == pixels_of(found.source).shape[:2] == (24, 32)


def test_what_is_no_picture_is_named() -> None:
    with pytest.raises(ValueError, match=r"picture row 7 cannot be read: no picture format"):
        record(0, source=Encoded(b"nothing", "row 7")).arrays()
