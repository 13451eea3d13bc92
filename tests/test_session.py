"""Sessions: the tree, untouched pixels, damage, and death at any moment."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from varedit.editing.change_map import Calibration
from varedit.editing.edit import Settings, apply_edit
from varedit.editing.manifest import make_manifest, read_manifest
from varedit.editing.mask import box_mask
from varedit.editing.session import Session, SessionError
from varedit.image_processor import ImageError, load_image
from varedit.image_writer import save_image
from varedit.pipeline import load_pipeline
from varedit.testing import tiny_pipeline

SIZE = (90, 60)
SENSITIVE = Settings(calibration=Calibration(floor=1.0, slope=0.0, token=0.0, high=1.5, low=1.0))
BOXES = [(5, 5, 20, 20), (40, 10, 30, 30), (15, 20, 30, 30)]


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """A JPEG on its side, with EXIF."""
    values = np.random.default_rng(0).integers(0, 256, (SIZE[0], SIZE[1], 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "on its side"
    path = tmp_path_factory.mktemp("photo") / "photo.jpg"
    Image.fromarray(values).save(path, exif=exif)
    return path


@pytest.fixture(scope="module")
def chain(pipeline, photo, tmp_path_factory):
    """original - 1 - 2, and 3 branching off 1."""
    session = Session.create(tmp_path_factory.mktemp("chain") / "deep" / "session", photo)
    for index, box in enumerate(BOXES):
        session.edit(pipeline, f"paint it {index}", seed=np.int64(index), settings=SENSITIVE, mask=box_mask(box, SIZE))
        if index == 1:
            assert session.undo() == 1
    return session


@pytest.fixture
def copy(chain, tmp_path):
    shutil.copytree(chain.folder, tmp_path / "session")
    return tmp_path / "session"


def test_the_tree(chain):
    session = Session.open(chain.folder)
    assert session.head == 3 and [step.number for step in session.path()] == [1, 3]
    assert [step.number for step in session.path(2)] == [1, 2] and session.path(0) == []
    assert [session.steps[n].manifest.instruction for n in (1, 2, 3)] == ["paint it 0", "paint it 1", "paint it 2"]
    assert {n: step.manifest for n, step in session.steps.items()} == {n: s.manifest for n, s in chain.steps.items()}
    for step in session.steps.values():
        assert step.result.is_file() and step.mask.is_file() and step.change_map.is_file()
        assert read_manifest(step.result) == step.manifest


def test_the_original_is_kept_byte_for_byte(chain, photo):
    assert chain.original.read_bytes() == photo.read_bytes()
    assert chain.original_name == "photo.jpg"


def test_untouched_pixels_are_the_originals(chain):
    original = np.asarray(chain.image(0).rgb)
    for number, boxes in ((1, BOXES[:1]), (2, BOXES[:2]), (3, [BOXES[0], BOXES[2]])):
        touched = np.zeros(SIZE[::-1], bool)
        for box in boxes:
            touched |= np.asarray(box_mask(box, SIZE)) > 0
        picture = np.asarray(chain.image(number).rgb)
        assert (picture[~touched] == original[~touched]).all()
        assert (picture[touched] != original[touched]).any()


def test_every_step_replays(chain, pipeline):
    for number in chain.steps:
        assert chain.replay(pipeline, number).differences == ()


def test_undo_and_branch_move_only_the_head(copy):
    session = Session.open(copy)
    assert [session.undo(), session.undo()] == [1, 0] and len(session.steps) == 3
    with pytest.raises(SessionError, match="nothing to undo"):
        session.undo()
    session.branch(2)
    assert Session.open(copy).head == 2
    with pytest.raises(SessionError, match="no step 9"):
        session.branch(9)
    assert Session.open(copy).head == 2


def test_export_is_the_step_with_the_originals_metadata(chain, tmp_path):
    chain.export(tmp_path / "a.png")
    written = load_image(tmp_path / "a.png")
    assert written.rgb.tobytes() == chain.image().rgb.tobytes() and written.exif
    assert read_manifest(tmp_path / "a.png") == chain.steps[3].manifest
    chain.export(tmp_path / "b.png", 0)
    assert load_image(tmp_path / "b.png").rgb.tobytes() == chain.image(0).rgb.tobytes()
    with pytest.raises(ImageError, match="exists already"):
        chain.export(tmp_path / "a.png", 2)
    assert load_image(tmp_path / "a.png").rgb.tobytes() == written.rgb.tobytes()


def test_transparency_turns_with_the_picture(pipeline, tmp_path):
    random = np.random.default_rng(0).integers(0, 256, (40, 60, 4), np.uint8)
    Image.fromarray(random).save(tmp_path / "photo.png")
    session = Session.create(tmp_path / "session", tmp_path / "photo.png")
    for expected in (random[:, ::-1, 3], random[:, :, 3]):  # mirrored, and mirrored again
        source = session.image() if session.head else load_image(tmp_path / "photo.png")
        result = apply_edit(pipeline, source, "mirror it", seed=1, settings=SENSITIVE)
        result = replace(result, change_map=replace(result.change_map, kind="global", orientation="mirrored"))
        if not session.head:
            assert np.array_equal(np.asarray(result.like.alpha), expected)
            assert result.like.alpha is not result.source.alpha
            masked = replace(result, area=Image.new("L", (60, 40), 255))
            assert masked.like is masked.source
        session.add(result, make_manifest(result, pipeline))
        exported = session.export(tmp_path / f"{session.head}.png")
        assert np.array_equal(np.asarray(load_image(exported).alpha), expected)


def test_an_export_without_a_manifest_leaves_none_of_an_earlier_one(chain, tmp_path):
    path = chain.export(tmp_path / "a.tiff", 1)
    assert read_manifest(path) == chain.steps[1].manifest
    chain.export(path, 0, overwrite=True)
    assert read_manifest(path) is None and list(tmp_path.iterdir()) == [path]


def test_sixteen_bits_a_channel_stay_so(pipeline, tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (*SIZE[::-1], 3), np.uint16)
    save_image(values, tmp_path / "photo.png")
    session = Session.create(tmp_path / "session", tmp_path / "photo.png")
    for index, box in enumerate(BOXES[:2]):
        session.edit(pipeline, "blur", seed=index, settings=SENSITIVE, mask=box_mask(box, SIZE))
    untouched = np.logical_and.reduce([np.asarray(box_mask(box, SIZE)) == 0 for box in BOXES[:2]])
    session.export(tmp_path / "out.png")
    for picture in (session.image(), load_image(tmp_path / "out.png")):
        assert (picture.rgb16_HW3[untouched] == values[untouched]).all()
        assert (picture.rgb16_HW3[~untouched] != values[~untouched]).any()


def test_looking_and_moving_loads_neither_torch_nor_pillow(copy):
    commands = [["log"], ["show"], ["undo"], ["branch", "3"]]
    code = (
        "import sys\nfrom varedit.cli import main\n"
        f"for name, *rest in {commands}:\n"
        f"    try: main(['session', name, {str(copy)!r}, *rest])\n"
        "    except SystemExit as ended: assert not ended.code\n"
        "assert not {'torch', 'diffusers', 'transformers', 'numpy', 'PIL'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "* 3  paint it 2  (seed 2)" in done.stdout and "at step 1" in done.stdout and '"stray"' in done.stdout


def test_an_edit_of_another_picture_is_not_recorded(chain, pipeline, photo):
    result = apply_edit(pipeline, photo, "blur", seed=1)  # of the original, not of the head
    with pytest.raises(ValueError, match="not made from step 3"):
        chain.add(result, make_manifest(result, pipeline))


# -- bad input


def test_create_refuses(photo, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    with pytest.raises(SessionError, match="exists already"):
        Session.create(tmp_path / "full", photo)
    with pytest.raises(ImageError, match="does not exist"):
        Session.create(tmp_path / "new", tmp_path / "none.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]
    (tmp_path / "empty").mkdir()
    assert Session.create(tmp_path / "empty", photo).head == 0
    with pytest.raises(SessionError, match="no session"):
        Session.open(tmp_path)


def _change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda f: (f / "session.json").write_text("{"), "session.json: it is no JSON"),
        (lambda f: (f / "session.json").write_text("[]"), "session.json"),
        (lambda f: _change(f / "session.json", format="x/2"), "x/2"),
        (lambda f: _change(f / "session.json", head=7), "steps/0007"),
        (lambda f: _change(f / "session.json", original={"file": "../a", "sha256": "", "name": ""}), "session.json"),
        (lambda f: (f / "original.jpg").unlink(), "original.jpg"),
        (lambda f: (f / "steps/0002/step.json").unlink(), "steps/0002/step.json"),
        (lambda f: (f / "steps/0002/step.json").write_bytes(b"\xff\xfe"), "steps/0002/step.json"),
        (lambda f: _change(f / "steps/0002/step.json", parent=2), "the parent 2"),
        (lambda f: _change(f / "steps/0002/step.json", manifest={}), "steps/0002/step.json"),
        (lambda f: _change(f / "steps/0002/step.json", manifest={"instruction": 1, "seed": 1}), "steps/0002"),
        (lambda f: shutil.rmtree(f / "steps/0001"), "step 1, is missing"),
    ],
)
def test_damaged_folders_are_named(damage, named, copy):
    damage(copy)
    with pytest.raises(SessionError, match="is damaged") as caught:
        Session.open(copy)
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_a_head_whose_step_is_missing_can_be_moved(copy, varedit):
    shutil.rmtree(copy / "steps/0003")
    varedit("session", "log", copy).assert_refused("steps/0003", "session branch")
    varedit("session", "branch", copy, "3").assert_refused("no step 3")
    assert varedit("session", "branch", copy, "2").code == 0
    assert Session.open(copy).head == 2


def test_the_current_folder_is_not_made_a_session(photo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SessionError, match="name a new folder"):
        Session.create(".", photo)


@pytest.mark.parametrize(("change", "named"), [({"format": "varedit/9"}, "varedit/9"), ({"settings": 1}, "settings")])
def test_a_damaged_or_later_manifest_is_named_where_it_is_needed(change, named, copy, pipeline, varedit):
    file = copy / "steps/0002/step.json"
    _change(file, manifest=json.loads(file.read_text())["manifest"] | change)
    assert "paint it 1" in varedit("session", "log", copy).out
    session = Session.open(copy)
    assert session.replay(pipeline, 3).same
    for use in (lambda: session.replay(pipeline, 2), lambda: session.image(2)):
        with pytest.raises(SessionError, match=f"steps/0002/step.json: .*{named}"):
            use()


@pytest.mark.parametrize("file", ["original.jpg", "steps/0001/result.png", "steps/0003/mask.png"])
@pytest.mark.parametrize("damage", ["changed", "truncated"])
def test_damaged_pictures_are_named(file, damage, copy, pipeline):
    mode = "L" if "mask" in file else "RGB"
    if damage == "changed":
        Image.new(mode, SIZE, 3 if mode == "L" else (1, 2, 3)).save(copy / file)
    else:
        (copy / file).write_bytes((copy / file).read_bytes()[:60])
    session = Session.open(copy)
    with pytest.raises(SessionError, match=file):
        session.replay(pipeline, 3 if "mask" in file or "0001" in file else 1)


# -- death at any moment


def _die_at(count: int) -> None:
    """Kill this process before its count-th flush or rename."""
    left = [count]

    def deadly(function):
        def call(*arguments, **options):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    for name in ("fsync", "replace", "rename"):
        setattr(os, name, deadly(getattr(os, name)))


def _in_a_child(work, count: int) -> bool:
    """Run `work` in a forked process that dies at a given moment; whether it got to the end."""
    child = os.fork()
    if child == 0:
        _die_at(count)
        work()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert os.WEXITSTATUS(status) == 0
    return True


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_while_recording_a_step(chain, pipeline, tmp_path):
    result = apply_edit(pipeline, chain.image(), "blur", seed=9, mask=box_mask(BOXES[0], SIZE))
    manifest = make_manifest(result, pipeline)
    before = {step.folder.name: _hashes(step.folder) for step in chain.steps.values()}
    outcomes = set()
    for count in range(100):
        folder = tmp_path / str(count)
        shutil.copytree(chain.folder, folder)
        finished = _in_a_child(lambda folder=folder: Session.open(folder).add(result, manifest), count)
        session = Session.open(folder)  # not damaged
        outcomes.add((len(session.steps), session.head))
        for name, hashes in before.items():
            assert _hashes(folder / "steps" / name) == hashes
        for number in session.steps:
            session.image(number)
        if 4 in session.steps:
            assert session.image(4).rgb.tobytes() == result.image.tobytes()
        session.branch(3)
        assert session.add(result, manifest).number == len(session.steps)  # goes on as if nothing had been
        assert Session.open(folder).image().rgb.tobytes() == result.image.tobytes()
        if finished:
            break
    # nothing yet; the step without the head; both.
    assert outcomes == {(3, 3), (4, 3), (4, 4)} and count > 10


def _hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_while_a_session_is_made(photo, tmp_path):
    for count in range(100):
        folder = tmp_path / str(count)
        if _in_a_child(lambda folder=folder: Session.create(folder, photo), count):
            break
        if folder.exists():  # whole
            assert Session.open(folder).image().height == 60
        else:
            assert Session.create(folder, photo).head == 0
    assert count > 3 and Session.open(folder).head == 0


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["at the first scale", "at the last scale", "while writing"])
def test_an_edit_killed_at_any_moment_can_be_made_again(moment, model_folder, photo, tmp_path):
    """The command itself, killed with SIGKILL; then the same edit gives the same files as one that was not killed."""
    edit = ["edit", "--seed=5", "--box=5,5,60,40", "--device=cpu", "--model", str(model_folder)]
    folders = [tmp_path / "killed", tmp_path / "whole"]
    for folder in folders:
        Session.create(folder, photo)
    code = "import sys; from varedit.cli import main; main(['session', *sys.argv[1:]])"
    arguments = [sys.executable, "-c", code, *edit, str(folders[0]), "paint it"]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    wanted = "scale   1/5" if moment == "at the first scale" else "scale   5/5"
    while process.poll() is None and not process.stderr.readline().startswith(wanted):
        pass
    while moment == "while writing" and process.poll() is None and not any((folders[0] / "steps").iterdir()):
        pass
    process.send_signal(signal.SIGKILL)
    assert process.wait() in (-signal.SIGKILL, 0)
    process.stderr.close()

    session = Session.open(folders[0])  # not damaged
    assert (len(session.steps), session.head) in {(0, 0), (1, 0), (1, 1)}
    for number in session.steps:
        session.image(number)
    session.branch(0)
    pipeline = load_pipeline(model_folder, "cpu")
    mask = box_mask((5, 5, 60, 40), SIZE)
    made = [Session.open(folder).edit(pipeline, "paint it", seed=5, mask=mask) for folder in folders]
    assert _hashes(made[0].folder) == _hashes(made[1].folder)
    for step in session.steps.values():  # made by the killed command
        assert _hashes(step.folder) == _hashes(made[1].folder)


def test_what_a_crash_left_is_ignored_and_swept(copy, chain, pipeline):
    for name, age in (("old", 4000), ("new", 0)):
        left = copy / "steps" / f".aside-{name}"
        left.mkdir()
        (left / "result.png").write_bytes(b"half")
        os.utime(left, (left.stat().st_mtime - age,) * 2)
    session = Session.open(copy)
    assert sorted(session.steps) == [1, 2, 3]
    result = apply_edit(pipeline, session.image(), "blur", seed=9)
    session.add(result, make_manifest(result, pipeline))
    names = sorted(path.name for path in (copy / "steps").iterdir())
    assert names == [".aside-new", "0001", "0002", "0003", "0004"]  # the newer one may be another process at work


def test_two_processes_at_once_lose_nothing(copy, pipeline):
    first, second = Session.open(copy), Session.open(copy)
    result = apply_edit(pipeline, first.image(), "blur", seed=9)
    manifest = make_manifest(result, pipeline)
    assert first.add(result, manifest).number == 4 and second.add(result, manifest).number == 5
    assert [Session.open(copy).steps[number].parent for number in (4, 5)] == [3, 3]


def test_a_full_disk_changes_nothing(copy, pipeline, monkeypatch):
    session = Session.open(copy)
    result = apply_edit(pipeline, session.image(), "blur", seed=9)
    manifest = make_manifest(result, pipeline)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SessionError, match="No space left"):
        session.add(result, manifest)
    with pytest.raises(SessionError, match="No space left"):
        Session.create(copy.parent / "new", session.original)
    with pytest.raises(SessionError, match="cannot be written .No space left"):
        session.undo()
    with pytest.raises(SessionError, match="cannot be written .No space left"):
        session.branch(2)
    monkeypatch.undo()
    assert list(copy.parent.iterdir()) == [copy]
    assert session.head == 3 and sorted(session.steps) == [1, 2, 3]
    assert sorted(path.name for path in (copy / "steps").iterdir()) == ["0001", "0002", "0003"]
    assert Session.open(copy).head == 3
