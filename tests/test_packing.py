"""What packing leaves alone, and what it reads of its own journal."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from varedit.cli import main
from varedit.data.faults import Skipped
from varedit.data.packing import pack
from varedit.data.record import Record


def make_records(count: int, origin: str = "pair") -> list[Record]:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 2, 32, 32, 3), np.uint8)
    return [Record(*pair, ("go",), origin=f"{origin} {i}") for i, pair in enumerate(pixels)]


class Stop(Exception):
    pass


def stop_after(items: list, count: int) -> Iterator:
    yield from items[:count]
    raise Stop


@pytest.mark.parametrize("name", ["theirs.tar", "shards.jsonl", "index.json", None])
def test_files_of_others_are_left_alone(tmp_path: Path, name: str | None) -> None:
    """Another program's download under way is no shard of ours, in whatever folder."""
    (tmp_path / "big.tar.partial").write_bytes(b"half of a download")
    if name is None:
        pack(make_records(2), tmp_path, size=128)
    else:
        (tmp_path / name).write_text('{"theirs": 1}\n')
        with pytest.raises(ValueError, match="choose an empty folder"):
            pack(make_records(2), tmp_path, size=128)
        assert (tmp_path / name).read_text() == '{"theirs": 1}\n'
    assert (tmp_path / "big.tar.partial").read_bytes() == b"half of a download"


def test_a_folder_packed_with_other_settings_keeps_its_partial_files(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        pack(stop_after(make_records(5), 5), tmp_path, size=128, records_per_shard=2)
    (tmp_path / "1.000-000002.tar.partial").write_bytes(b"half")
    with pytest.raises(ValueError, match="was packed with"):
        pack(make_records(5), tmp_path, size=256, records_per_shard=2)
    assert (tmp_path / "1.000-000002.tar.partial").exists()
    pack(make_records(5), tmp_path, size=128, records_per_shard=2)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("separator", ["\u2028", "\x85"])
def test_an_origin_with_a_line_separator_is_continued(tmp_path: Path, separator: str) -> None:
    records = [
        Record(record.source, record.target, record.instructions, origin=f"a{separator}b", licence=f"c{separator}d")
        for record in make_records(5)
    ]
    with pytest.raises(Stop):
        pack(stop_after(records, 4), tmp_path, size=128, records_per_shard=2)
    assert pack(records, tmp_path, size=128, records_per_shard=2).reused == 2


def test_faults_are_listed_in_one_order_however_often_the_run_stopped(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (32, 32)).save(stream, "BMP")
    (tmp_path / "broken.bmp").write_bytes(stream.getvalue()[:200])
    items = make_records(4)
    items[0] = Record(tmp_path / "broken.bmp", items[0].target, ("go",), origin="broken")
    items.insert(1, Skipped("gone", "missing image", "nowhere"))
    settings = {"size": 128, "records_per_shard": 2, "max_skipped": 0.6}
    pack(items, tmp_path / "whole", **settings)
    with pytest.raises(Stop):
        pack(stop_after(items, 4), tmp_path / "parts", **settings)
    pack(items, tmp_path / "parts", **settings)
    whole, parts = ((tmp_path / name / "index.json").read_bytes() for name in ("whole", "parts"))
    assert whole == parts and len(json.loads(whole)["num_skipped"]) == 2


@pytest.mark.parametrize(
    "option", ["--feature-dtype=float32", "--feature-fit=native", "--feature-size=128", "--text-encoder=t5"]
)
def test_an_option_of_features_without_features_is_refused(
    tmp_path: Path, option: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["data", "pack", str(tmp_path), "--output", str(tmp_path / "out"), option])
    assert caught.value.code == 2 and not (tmp_path / "out").exists()
    assert f"{option.split('=')[0]} without --features does nothing" in capsys.readouterr().err
