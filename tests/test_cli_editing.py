"""varedit batch, session and replay, run in process on a tiny model folder."""

import json
import re
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

from varedit.cli import main
from varedit.image_processor import load_image


@dataclass
class Ran:
    code: int
    out: str
    err: str


@pytest.fixture
def varedit(capsys):
    """Run the command: varedit("batch", ...) -> exit code, stdout, stderr."""

    def run(*arguments) -> Ran:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Ran(ended.value.code, out, err)

    return run


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from varedit.testing import tiny_pipeline

    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(folder)
    return ["--model", folder, "--device=cpu"]


@pytest.fixture
def photo(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    Image.fromarray(values).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def assert_refused(ran: Ran, *mentioned: str) -> None:
    """Exit code 2 and one line that names what was wrong (notes may stand before it)."""
    assert ran.code == 2
    lines = [line for line in ran.err.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), ran.err
    for text in mentioned:
        assert text in lines[0]


# -- session


def test_a_session_from_new_to_export(varedit, model, photo, tmp_path):
    folder = tmp_path / "session"
    ran = varedit("session", "new", folder, photo)
    assert ran.code == 0 and "90 x 60" in ran.out
    ran = varedit(
        "session", "edit", folder, "paint it [bold]red[/]", "--box=10,10,30,30", "--seed=7", "--preserve=off", *model
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
    assert_refused(varedit("session", "export", folder, tmp_path / "out.png"), "exists already")
    assert_refused(varedit("session", "export", folder, tmp_path / "b.png", "--step=9"), "no step 9")
    (folder / "session.json").write_text("{")
    assert_refused(varedit("session", "log", folder), "session.json", "damaged")


def test_session_refuses_before_the_model_is_loaded(varedit, photo, tmp_path):
    folder = tmp_path / "session"
    assert_refused(varedit("session", "new", folder, tmp_path / "none.png"), "none.png")
    assert varedit("session", "new", folder, photo).code == 0
    assert_refused(varedit("session", "new", folder, photo), "exists already")
    edit = ["session", "edit", folder, "--model", "/nowhere"]
    assert_refused(varedit(*edit, " "), "empty")
    assert_refused(varedit(*edit, "x", "--seed=-1"), "-1")
    assert_refused(varedit(*edit, "x", "--box=1,2,3"), "1,2,3")
    assert_refused(varedit(*edit, "x", "--box=500,2,3,3"), "covers no pixel")
    assert_refused(varedit(*edit, "x", "--box=1,2,3,3", "--mask", photo), "--mask and --box")
    Image.new("L", (60, 90), 255).save(tmp_path / "tall.png")
    assert_refused(varedit(*edit, "x", "--mask", tmp_path / "tall.png"), "aspect")
    Image.new("L", (90, 60)).save(tmp_path / "empty.png")
    assert_refused(varedit(*edit, "x", "--mask", tmp_path / "empty.png"), "empty")
    assert_refused(varedit(*edit, "x", "--size=100"), "100")
    assert_refused(varedit(*edit, "x"), "/nowhere")
    assert_refused(varedit("session", "undo", folder), "nothing to undo")
    assert_refused(varedit("session", "log", tmp_path / "none"), "no session")
    assert_refused(varedit("replay", folder), "no steps")


# -- batch and replay


def test_batch_exit_codes_record_and_replay(varedit, model, photo, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "jobs.csv").write_text("image,instruction\nphoto.png,blur\nnone.png,blur\n")
    batch = ["batch", tmp_path / "jobs.csv", "-o", out, *model]
    ran = varedit(*batch)
    assert ran.code == 3 and "1 edited, 1 failed" in ran.out
    assert "failed: line 3, none.edited.png" in ran.err and "does not exist" in ran.err
    assert_refused(varedit(*batch), "--resume")
    assert_refused(varedit(*batch, "--resume", "--overwrite"), "one of them")
    photo.with_name("none.png").write_bytes(photo.read_bytes())
    ran = varedit(*batch, "--resume")
    assert ran.code == 0 and "1 edited, 0 failed, 1 were done before" in ran.out
    ran = varedit(*batch, "--resume")
    assert ran.code == 0 and "0 edited, 0 failed, 2 were done before" in ran.out

    first = out / "photo.edited.png"
    assert_refused(varedit("replay", first, *model), "'photo.png' is not beside it", "--input")
    again = tmp_path / "again.png"
    ran = varedit("replay", first, "--input", photo, "-o", again, *model)
    assert ran.code == 0 and "bit for bit" in ran.out
    assert again.read_bytes() == first.read_bytes()
    assert_refused(varedit("replay", first, "--input", photo, "-o", again, *model), "exists already")

    Image.new("RGB", (90, 60), "red").save(tmp_path / "red.png")
    ran = varedit("replay", first, "--input", tmp_path / "red.png", *model)
    assert ran.code == 1 and "  input: " in ran.out
    with Image.open(first) as image:  # saved again by a program that keeps metadata but not pixels
        xmp = image.info["xmp"]
    Image.new("RGB", (90, 60), "red").save(tmp_path / "fake.jpg", xmp=xmp)
    ran = varedit("replay", tmp_path / "fake.jpg", *model)
    assert ran.code == 1 and "  file: fake.jpg" in ran.out


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
    assert_refused(varedit("replay", photo), "no manifest")
    assert_refused(varedit("replay", tmp_path / "none.png"), "does not exist")
    photo.with_name("photo.png.varedit.json").write_text('{"format": "varedit/1"}')
    assert_refused(varedit("replay", photo), "damaged")
    assert_refused(varedit("replay", tmp_path, "--input", photo), "a session has its own inputs")
    assert_refused(varedit("batch", tmp_path / "none.csv", "-o", tmp_path / "o"), "none.csv")
    assert_refused(varedit("batch", tmp_path, "-o", tmp_path / "o"), "--instruction")
    common = ["batch", tmp_path, "-o", tmp_path / "o", "--instruction=x"]
    assert_refused(varedit(*common, "--workers=0"), "num_workers 0")
    assert_refused(varedit(*common, "--size=5"), "size 5")
    assert_refused(varedit(*common, "--model", "/nowhere"), "/nowhere")


def test_without_ray_one_line_says_so(varedit, photo, tmp_path):
    import importlib.util

    if importlib.util.find_spec("ray"):
        pytest.skip("Ray is installed")
    ran = varedit("batch", photo.parent, "-o", tmp_path / "o", "--instruction=x", "--ray")
    assert_refused(ran, "--ray", "varedit[ray]")
    assert not (tmp_path / "o").exists()
