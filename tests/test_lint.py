"""Every planted fault is found; clean pairs of the synthetic world pass."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from varedit.alignment import find_motion
from varedit.data.faults import Skipped
from varedit.data.lint import CHECKS, Duplicates, LintOptions, lint
from varedit.data.lint_report import write_html, write_json
from varedit.data.record import Record
from varedit.data.synthetic import World, to_record
from varedit.data.wording import contradiction, foreign

PAD = 24


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """Something like a photograph: structure at every size, from noise of many scales; uint8 (192, 256, 3)."""
    rng = np.random.default_rng(0)
    layers = np.zeros((192, 256, 3), np.float32)
    for step in (4, 8, 16, 32, 64):
        noise = rng.integers(0, 256, (192 // step + 1, 256 // step + 1, 3), np.uint8)
        layers += np.asarray(Image.fromarray(noise).resize((256, 192), Image.Resampling.BICUBIC), np.float32)
    return (layers / 5).astype(np.uint8)


def edited(pixels: np.ndarray, level: int = 230) -> np.ndarray:
    """A red patch on part of the picture."""
    pixels = pixels.copy()
    pixels[40:100, 60:130] = (level, 30, 30)
    return pixels


def moved(pixels: np.ndarray, zoom: float, shift_x: float, shift_y: float) -> np.ndarray:
    """The picture magnified about its centre and shifted."""
    wide = np.pad(pixels, ((PAD, PAD), (PAD, PAD), (0, 0)), mode="reflect")
    height, width = wide.shape[:2]
    x, y = width / 2, height / 2
    matrix = (1 / zoom, 0, x - (x + shift_x) / zoom, 0, 1 / zoom, y - (y + shift_y) / zoom)
    image = Image.fromarray(wide).transform((width, height), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
    return np.asarray(image)[PAD:-PAD, PAD:-PAD]


def checks(*records: Record | Skipped, **options) -> list[list[str]]:
    report = lint(records, LintOptions(**options))
    return [[f.check for f in report.findings if f.position == i] for i in range(len(records))]


@pytest.mark.parametrize(
    "motion", [(1, 1, 0), (1, 3, -2), (1, -9, 6), (1.02, 0, 0), (0.96, 2, 0), (1.08, -1, 2)], ids=str
)
def test_motion_is_measured_beside_a_local_edit(photo: np.ndarray, motion: tuple[float, float, float]) -> None:
    found = find_motion(photo, moved(edited(photo), *motion))
    assert found is not None
    assert abs(found.zoom - motion[0]) < 0.003
    assert abs(found.shift_x - motion[1]) < 0.25 and abs(found.shift_y - motion[2]) < 0.25


def test_motion_is_measured_in_the_pixels_given(photo: np.ndarray) -> None:
    large = np.asarray(Image.fromarray(photo).resize((1024, 768), Image.Resampling.BICUBIC))
    found = find_motion(large, moved(large, 1, 8, -12))
    assert found is not None and abs(found.shift_x - 8) < 0.5 and abs(found.shift_y + 12) < 0.5


def test_what_is_aligned_shows_no_motion(photo: np.ndarray) -> None:
    noisy = np.clip(edited(photo) + np.random.default_rng(1).normal(0, 6, photo.shape), 0, 255).astype(np.uint8)
    flat = np.full((128, 128, 3), 90, np.uint8)
    one_object, elsewhere = flat.copy(), flat.copy()
    one_object[20:50, 20:50] = elsewhere[26:56, 30:60] = photo[:30, :30]
    for before, after in (
        (photo, edited(photo)),
        (photo, noisy),
        (photo, (photo * 0.6 + 40).astype(np.uint8)),
        (photo, 255 - photo),
        (photo, photo[::-1]),
        (photo, np.rot90(photo, 2)),
        (one_object, elsewhere),
        (flat, flat),
        (photo[:20, :20], photo[:20, :20]),
    ):
        assert find_motion(np.ascontiguousarray(before), np.ascontiguousarray(after)) is None


def test_planted_faults_are_all_found(photo: np.ndarray, tmp_path: Path) -> None:
    def pair(source: object, target: object, *texts: str, edit_type: str = "") -> Record:
        return Record(source, target, texts or ("paint the wall red",), edit_type=edit_type)

    (tmp_path / "cut.png").write_bytes(b"")
    whole = tmp_path / "whole.png"
    Image.fromarray(photo).save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:5000])
    other = np.roll(photo[:, ::-1], 60, axis=0)[:, :, ::-1]
    noise = np.clip(photo + np.random.default_rng(2).normal(0, 3, photo.shape), 0, 255).astype(np.uint8)
    flipped = np.ascontiguousarray(photo[::-1])
    planted = {
        "missing image": Skipped("x", "missing image", "gone"),
        "unreadable image": pair(whole, tmp_path / "cut.png"),
        "sizes differ": pair(photo, photo[:100]),
        "tiny image": pair(other[:40, :40], edited(other)[40:80, 60:100]),
        "misaligned": pair(photo, moved(edited(photo), 1, 4, -3)),
        "unchanged": pair(photo[::-1], noise[::-1]),
        "everything changed": pair(photo[::-1, ::-1], other, "add a hat to the dog"),
        "near duplicate": pair(noise, edited(photo)),
        "empty instruction": pair(flipped, edited(flipped), " .,"),
        "contradictory instruction": pair(other, edited(other), "paint the wall red", "make it darker and brighter"),
        "wrong language": pair(other[:, :200], edited(other)[:, :200], "Füge dem Hund einen Hut hinzu"),
    }
    found = checks(pair(photo, edited(photo)), *planted.values())
    assert found[0] == []
    for check, names in zip(planted, found[1:]):
        assert check in names, (check, names)
        assert len(names) == 1 or check == "tiny image", (check, names)


def test_global_instructions_may_change_everything(photo: np.ndarray) -> None:
    inverted = 255 - photo
    assert checks(Record(photo, inverted, ("turn the image into a negative",))) == [[]]
    assert checks(Record(photo, inverted, ("go",), edit_type="tone")) == [[]]
    assert checks(Record(photo, inverted, ("add a hat",))) == [["everything changed"]]
    assert checks(Record(photo, np.ascontiguousarray(photo[:, ::-1]), ("mirror the picture",))) == [[]]
    assert checks(Record(photo, moved(photo, 1.1, 0, 0), ("zoom in a little",))) == [[]]


def test_duplicates_survive_compression_and_scaling(photo: np.ndarray, tmp_path: Path) -> None:
    seen = Duplicates()
    assert seen.add("first", photo, edited(photo)) is None
    smaller = [np.asarray(Image.fromarray(p).resize((128, 96), Image.Resampling.BOX)) for p in (photo, edited(photo))]
    assert seen.add("smaller", *smaller) == "first"
    Image.fromarray(photo).save(tmp_path / "a.jpg", quality=60)
    assert seen.add("jpeg", np.asarray(Image.open(tmp_path / "a.jpg")), edited(photo)) == "first"
    assert seen.add("another edit", photo, edited(photo, 150)) is None
    assert seen.add("another picture", photo[::-1], edited(photo)[::-1]) is None


@pytest.mark.parametrize(
    "text",
    [
        "Füge dem Hund einen Hut hinzu",
        "Ajoute un chapeau au chien",
        "Quita el perro",
        "Aggiungi un cappello al cane",
        "Adicione um chapéu ao cão",
        "Voeg een hoed toe",
        "给狗戴上帽子",
        "Сделай фон синим",
    ],
)
def test_other_languages(text: str) -> None:
    assert foreign(text)


@pytest.mark.parametrize(
    "text",
    [
        "make it brighter and darker",
        "add a dog and remove the dog",
        "remove the dog, then paint it blue",
        "change the red car to red",
        "make the red car red",
        "keep the image unchanged.",
        "move the car to the left and to the right",
        "make the picture darker, then brighten it",
        "make it more blurry and less blurry",
        "add more contrast and less contrast",
    ],
)
def test_contradictions(text: str) -> None:
    assert contradiction(text)


@pytest.mark.parametrize(
    "text",
    [
        "make the left dog bigger and the right dog smaller",
        "replace the red ball with a red cube",
        "add a dog and remove the cat",
        "remove the hat and make the dog red",
        "make the sign say 'le chat est sur la table'",
        "make the red car dark red",
        "change the dark red car to red",
        "raise his left arm and lower his right arm",
        "change the season from summer to winter",
        "Hut",
        "make it less blurry and more vivid",
        "make it more vivid, but less dark",
        "make it less blurry and sharper",
    ],
)
def test_words_that_are_fine(text: str) -> None:
    assert foreign(text) is None and contradiction(text) is None


def test_clean_synthetic_pairs_pass() -> None:
    """Less than one in a hundred, even without knowing the type of the edit."""
    world = World(size=128)
    records = (to_record(world.pair(11, i), str(i)) for i in range(150))
    report = lint(dataclasses.replace(record, edit_type="", mask=None) for record in records)
    assert report.num_pairs == 150
    assert report.num_flagged <= 1, report.findings


@pytest.mark.slow
def test_five_hundred_clean_pairs_with_photographs(shared_dir: Path) -> None:
    world = World(objects=shared_dir / "data" / "objects", photos=shared_dir / "data" / "photos", size=256)
    report = lint(to_record(world.pair(11, i), str(i)) for i in range(500))
    assert report.num_flagged < 5, report.findings


def test_report_files(photo: np.ndarray, tmp_path: Path) -> None:
    records = [
        Record(photo, photo, ("<b>say & go</b>",), origin="first"),
        Skipped("line 7", "not UTF-8", "byte \udcff"),
        Record(photo[::-1], edited(photo)[::-1], ("fine words",)),
    ]
    report = lint(records)
    write_json(report, "here", tmp_path / "deep" / "report.json")
    write_html(report, "here", tmp_path / "report.html")
    values = json.loads((tmp_path / "deep" / "report.json").read_text("utf-8"))
    assert (values["source"], values["num_pairs"], values["num_flagged"]) == ("here", 3, 2)
    assert values["counts"] == {"not UTF-8": 1, "unchanged": 1}
    assert [(row["position"], row["check"]) for row in values["findings"]] == [(0, "unchanged"), (1, "not UTF-8")]
    page = (tmp_path / "report.html").read_text("utf-8")
    assert page.count("data:image/jpeg;base64,") == 2 and "&lt;b&gt;say &amp; go" in page and "<b>say" not in page
    assert "http" not in page
    assert set(values["counts"]) <= set(CHECKS)


def test_findings_on_words_are_shown_with_the_pictures(photo: np.ndarray, tmp_path: Path) -> None:
    """All of them: one whose pictures cannot be read comes last and without."""
    (tmp_path / "broken.png").write_bytes(b"nothing")
    records = [
        Record(tmp_path / "broken.png", photo, ("",), origin="broken"),
        Record(photo, edited(photo), ("", "!"), origin="fine but for words"),
    ]
    report = lint(records)
    assert list(report.pictures) == [1]
    assert report.counts == {"unreadable image": 1, "empty instruction": 2}, "pairs, not phrasings"
    write_html(report, "here", tmp_path / "report.html")
    section = (tmp_path / "report.html").read_text("utf-8").split('<h2 id="empty-instruction">')[1]
    rows = section.split("<tr><td>")[1:]
    assert ["broken" in row for row in rows] == [False, False, True]
    assert ["data:image" in row for row in rows] == [True, True, False]


def test_a_very_elongated_picture_is_looked_at() -> None:
    strip = np.random.default_rng(0).integers(0, 256, (3, 2000, 3), np.uint8)
    assert find_motion(strip, strip[:, ::-1]) is None
    assert checks(Record(strip, strip, ("x",))) == [["tiny image", "unchanged"]]


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="min_side is 0"):
        lint([], LintOptions(min_side=0))
    with pytest.raises(ValueError, match="holds no pairs"):
        lint([])
