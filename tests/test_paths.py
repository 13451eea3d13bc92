"""Names that come from elsewhere."""

import pytest

from varedit.paths import leaves_folder


@pytest.mark.parametrize("name", ["a.png", "sub/a.png", "a..b/c.png", "4:3/a.png", "..a", "a b.png"])
def test_names_that_stay(name):
    assert not leaves_folder(name)


@pytest.mark.parametrize("name", ["../a.png", "sub/../../a.png", "/a.png", "\\\\server\\a.png", "..\\a.png", "\\a.png"])
def test_names_that_lead_out(name):
    assert leaves_folder(name)
