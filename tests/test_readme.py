"""The README's code blocks run, and what the documents point to exists."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def commands(program: str) -> list[list[str]]:
    """Every command line of the shell blocks that starts with `program`, as arguments."""
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith(f"{program} ")]


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """An empty folder with a photo.jpg; needs the default model."""
    from varedit.pipeline import DEFAULT_MODEL

    if not (DEFAULT_MODEL / "model_index.json").exists():
        pytest.skip("this checkout has no default model in varedit/models/tiny")
    ramp = Image.linear_gradient("L").resize((150, 100))
    Image.merge("RGB", (ramp, ramp.rotate(180), ramp.rotate(90))).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_is_something_to_test():
    assert len(blocks("python")) >= 2 and len(commands("varedit")) >= 4 and len(commands("make")) == 2


def test_python_blocks(workplace):
    program = "\n".join(blocks("python"))
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "scale 1 of" in done.stdout
    for name in ("photo.edited.png", "preview.png"):
        with Image.open(workplace / name) as image:
            assert image.size == (150, 100)


def test_edits_with_the_default_model(workplace, capsys):
    from varedit.cli import main

    ran = [arguments for arguments in commands("varedit") if "--model" not in arguments and arguments[0] == "edit"]
    assert len(ran) >= 2
    for arguments in ran:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0, capsys.readouterr().err
    for name in ("photo.edited.jpg", "brighter.png"):
        with Image.open(workplace / name) as image:
            assert image.size == (150, 100)


@pytest.mark.parametrize("arguments", commands("varedit"), ids=" ".join)
def test_every_command_and_option_exists(arguments, capsys):
    from varedit.cli import main

    options = [argument for argument in arguments if argument.startswith("--")]
    with pytest.raises(SystemExit) as ended:
        main([arguments[0], "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    for option in options:
        assert re.search(rf"{option}\b", text), f"varedit {arguments[0]} has no option {option}"


def test_every_make_target_exists():
    makefile = (REPOSITORY / "Makefile").read_text()
    mentioned = {target for arguments in commands("make") for target in arguments}
    mentioned |= set(re.findall(r"`make ([a-z-]+)", README + (REPOSITORY / "CONTRIBUTING.md").read_text()))
    assert mentioned
    for target in mentioned:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"the Makefile has no target {target}"


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "docs/how_it_works.md"])
def test_links_point_to_files(document):
    path = REPOSITORY / document
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), f"{document} links to {target}, which does not exist"


def test_names_in_how_it_works_exist_in_the_code():
    text = (REPOSITORY / "docs" / "how_it_works.md").read_text()
    code = "\n".join(path.read_text() for path in (REPOSITORY / "varedit").rglob("*.py"))
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for name in set(re.findall(r"`([A-Za-z_][\w.]*)(?:\([^`]*\))?`", text)):
        if len(name) > 2 and not name.endswith((".py", "_BlC2")) and name not in ("DiffusionPipeline.from_pretrained",):
            last = name.split(".")[-1]
            assert re.search(rf"\b{last}\b", code), f"how_it_works.md names {name}, which is not in the code"


def test_the_drawn_scene_is_the_one_that_make_edit_names(tmp_path):
    """On every machine: emoji, which are the system's, would change what is drawn."""
    pytest.importorskip("skimage")
    subprocess.run([sys.executable, REPOSITORY / "docs/sample.py", "scene", tmp_path / "scene.png"], check=True)
    red, green, blue = Image.open(tmp_path / "scene.png").getpixel((103, 150))
    assert "make the red circle blue" in (REPOSITORY / "Makefile").read_text() and red > 180 > 100 > max(green, blue)
