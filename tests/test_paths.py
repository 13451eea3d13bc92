"""Names that come from elsewhere."""

import os

import pytest

from varedit.paths import leaves_folder, visible


@pytest.mark.parametrize("name", ["a.png", "sub/a.png", "a..b/c.png", "..a", "a b.png"])
def test_names_that_stay(name):
    assert not leaves_folder(name)


def test_a_drive_leads_out_where_there_are_drives():
    assert leaves_folder("4:3/a.png") == (os.name == "nt")


OUT = ["../a.png", "sub/../../a.png", "/a.png", "//a.png", "//./a.png", r"\\server\a.png", r"..\a.png", r"\a.png"]


@pytest.mark.parametrize("name", OUT)
def test_names_that_lead_out(name):
    assert leaves_folder(name)


def test_what_systems_put_into_a_folder_is_not_seen(tmp_path):
    for name in ("a.png", ".hidden/a.png", "._a.png", "Thumbs.db", "sub/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = visible((path for path in tmp_path.rglob("*") if path.is_file()), tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["a.png", "sub/b.png"]
