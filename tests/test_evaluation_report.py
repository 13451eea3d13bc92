"""Scores, protocols, reports and the paper's table."""

import json
import re

import numpy as np
import pytest
from PIL import Image
from test_evaluation_run import command, plain

from varedit.evaluation.cases import Benchmark, Case
from varedit.evaluation.editors import make_editor
from varedit.evaluation.features import Backbones
from varedit.evaluation.generate import generate, result_path
from varedit.evaluation.paper import COLUMNS, TABLE, own_row, standing
from varedit.evaluation.plots import axis, dots
from varedit.evaluation.report import load_runs, paired, summary_table, write_report
from varedit.evaluation.scores import METRICS, bootstrap, check_metrics, digest, score, summary


def test_scores_are_worked_out_and_the_same_to_the_byte(tmp_path):
    generate(plain(), make_editor("identity"), tmp_path)
    result = score(plain(), tmp_path, ["l1", "l1_source"], Backbones())
    assert result["overall"]["l1"]["mean"] == pytest.approx(10 / 255, abs=1e-6)
    assert result["overall"]["l1_source"] == {"mean": 0, "low": 0, "high": 0, "n": 6}
    assert set(result["types"]) == {"even", "odd"} and result["types"]["odd"]["l1"]["n"] == 3
    first = (tmp_path / "scores.json").read_bytes()
    score(plain(), tmp_path, ["l1", "l1_source"], Backbones())
    assert (tmp_path / "scores.json").read_bytes() == first
    assert b"seconds" not in first


def test_stray_of_an_edit_of_the_whole_picture(tmp_path):
    """Nothing lies outside its mask: with a known answer what is on the way to it is asked for, without one all is."""
    rng = np.random.default_rng(0)
    source = np.kron(rng.integers(40, 120, (4, 4, 3)), np.ones((16, 16, 1))).astype(np.uint8)
    everywhere = np.ones((64, 64), bool)
    cases = (
        Case("known", "brighter", source, target=source + 100, mask=everywhere),
        Case("unknown", "brighter", source, mask=everywhere),
    )
    benchmark = Benchmark("own", cases, ())
    generate(benchmark, make_editor("identity"), tmp_path)
    for case in cases:
        Image.fromarray(source + 100).save(result_path(tmp_path, case.key))
    found = score(benchmark, tmp_path, ["stray", "l1_source"], Backbones())
    assert [row["scores"]["stray"] for row in found["rows"]] == [0, None]
    assert found["overall"]["stray"]["n"] == 1 and found["overall"]["l1_source"]["n"] == 2
    for case in cases:
        Image.fromarray(255 - source).save(result_path(tmp_path, case.key))
    assert score(benchmark, tmp_path, ["stray"], Backbones())["rows"][0]["scores"]["stray"] > 0.3


def test_a_mean_over_fewer_cases_says_so(tmp_path):
    masks = (np.ones((16, 16), bool), np.eye(16, dtype=bool))
    cases = tuple(Case(f"k{i}", "x", np.zeros((16, 16, 3), np.uint8), mask=mask) for i, mask in enumerate(masks))
    generate(Benchmark("own", cases, ()), make_editor("identity"), tmp_path / "run")
    found = score(Benchmark("own", cases, ()), tmp_path / "run", ["l1_source", "mse"], Backbones())
    write_report(load_runs([tmp_path / "run"]), tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().count("<small>1 of 2 cases</small>") == 3  # overall, its type, all
    markdown = (tmp_path / "page.md").read_text()
    assert "| all | 2 | 0.000 (0.000 to 0.000) | 0.000 (0.000 to 0.000), n 1 |" in markdown
    assert summary_table(found).caption.startswith("* over those")
    assert list(summary_table(found).columns[3].cells) == ["0.000 *"] * 2


def test_bootstrap_interval():
    values = [float(i % 2) for i in range(400)]
    mean = bootstrap(values, "a")
    assert mean.mean == 0.5 and mean.n == 400
    assert mean.high - mean.low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.1)
    assert mean == bootstrap(values, "a") and mean != bootstrap(values, "b")


def test_mean_of_the_means_of_types():
    """GEdit-Bench: three cases of one type at 1 and one of another at 0 make 0.5, not 0.75."""
    rows = [{"type": "a", "scores": {"x": 1.0}}] * 3 + [{"type": "b", "scores": {"x": 0.0}}]
    assert summary(rows, ["x"], "all")["x"]["mean"] == 0.75
    assert summary(rows, ["x"], "all", "types")["x"] == {"mean": 0.5, "low": 0.5, "high": 0.5, "n": 4}


def test_protocol_covers_what_shapes_a_number_and_not_the_editor(tmp_path):
    def protocol(name, benchmark, metrics=("l1",), editor="identity", **models):
        generate(benchmark, make_editor(editor), tmp_path / name)
        return score(benchmark, tmp_path / name, metrics, Backbones(**models))["protocol_sha256"]

    base = protocol("a", plain())
    assert protocol("b", plain(), editor="oracle") == base
    assert protocol("c", plain(5)) != base
    assert protocol("d", plain(), metrics=("l1", "l1_source")) != base
    assert protocol("e", plain(fit="bicubic")) != base
    other = [Case(c.key, c.instruction, c.source, c.edit_type, target=c.target + 1) for c in plain().cases]
    assert protocol("g", Benchmark("own", tuple(other), ("l1",))) != base
    masked = [Case(c.key, c.instruction, c.source, c.edit_type, target=c.target, mask=np.ones((16, 16), bool))
              for c in plain().cases]  # fmt: skip
    assert protocol("h", Benchmark("own", tuple(masked), ("l1",))) != base
    assert protocol("i", plain(mean_over="types")) != base
    assert protocol("j", plain(settings={"revision": "b31936a"})) != base
    written = json.loads((tmp_path / "j/scores.json").read_text())
    assert written["protocol"]["settings"] == {"revision": "b31936a"}
    darker = [Case(c.key, c.instruction, c.source // 2, c.edit_type, target=c.target) for c in plain().cases]
    assert protocol("f", Benchmark("own", tuple(darker), ("l1",))) != base


def test_unknown_metrics_are_refused_before_any_work():
    with pytest.raises(ValueError, match="metric 'beauty' is unknown"):
        check_metrics(["beauty"], Backbones())
    assert {name for name, metric in METRICS.items() if metric.better == "lower"} == {
        "l1", "l2", "l1_source", "structure", "misalignment", "drift", "stray", "mse", "lpips",
    }  # fmt: skip


@pytest.fixture(scope="module")
def procedural_runs(tmp_path_factory):
    """The two ends of the procedural benchmark, made by the command."""
    folder = tmp_path_factory.mktemp("runs")
    for editor in ("identity", "oracle"):
        command("evaluate", "run", "--benchmark", "procedural", "--editor", editor, "--limit", 8, "-o", folder / editor)
    return folder


def test_procedural_ends(procedural_runs, capsys):
    ends = {name: json.loads((procedural_runs / name / "scores.json").read_text()) for name in ("identity", "oracle")}
    for name, value in (("identity", 0), ("oracle", 1)):
        overall = ends[name]["overall"]
        assert overall["success"]["mean"] == value and overall["completeness"]["mean"] == value
        assert overall["balance"]["mean"] == 10 * value and overall["preservation"]["mean"] == 1
        assert overall["closer"]["mean"] == overall["half"]["mean"] == value
    assert ends["identity"]["protocol_sha256"] == ends["oracle"]["protocol_sha256"]
    for row in ends["oracle"]["rows"]:
        assert sum(group.startswith("scene: ") for group in row["groups"]) == 1
        assert any(group.startswith("new: ") for group in row["groups"])
    groups = ends["oracle"]["groups"]
    assert groups["scene: drawn"]["balance"]["n"] == 8 and "scene: photograph" not in groups  # none are given here
    counts = {group: sum(group in row["groups"] for row in ends["oracle"]["rows"]) for group in groups}
    assert {group: means["success"]["n"] for group, means in groups.items()} == counts
    before = (procedural_runs / "oracle/scores.json").read_bytes()
    out = command("evaluate", "run", "--benchmark", "procedural", "--editor", "oracle", "--limit", 8, "-o",
                  procedural_runs / "oracle", capsys=capsys).out  # fmt: skip
    assert "0 edited, 8 found done, 0 failed" in out and "8 of 8 cases scored" in out
    assert (procedural_runs / "oracle/scores.json").read_bytes() == before


def test_report_page(procedural_runs, tmp_path, capsys):
    html = tmp_path / "report.html"
    runs = (procedural_runs / "identity", procedural_runs / "oracle")
    command("evaluate", "report", *runs, "--html", html, capsys=capsys)
    page = html.read_text()
    scores = 8
    assert page.count("<article") == 8 and page.count("<svg") == 2 * scores  # overall and by type
    assert page.count("data:image/webp;base64,") == 8 * 4  # source, two results, known answer
    assert not re.search(r'(?:src|href)="(?!data:)', page)  # nothing from elsewhere
    report = json.loads(html.with_suffix(".json").read_text())
    success = next(one for one in report["paired"][0]["scores"] if one["metric"] == "success")
    assert success["difference"] == 1 and success["wins"] == 8 and success["p"] < 0.02
    markdown = html.with_suffix(".md").read_text()
    assert "| success | +1.000 (+1.000 to +1.000)" in markdown
    assert re.search(r"^\| all \| 8 \| 1.000 \(1.000 to 1.000\) \|", markdown, re.MULTILINE)
    assert re.search(r"^\| scene: drawn \| 8 \| 1.000", markdown, re.MULTILINE)
    assert not list(tmp_path.glob("*.tmp"))
    command("evaluate", "report", *runs, "--html", html, "--overwrite", capsys=capsys)


def test_a_report_replaces_no_scores(procedural_runs, capsys):
    scores = procedural_runs / "oracle" / "scores.json"
    before, html = scores.read_bytes(), scores.with_suffix(".html")
    ran = command("evaluate", "report", scores.parent, "--html", html, code=2, capsys=capsys)
    assert "scores.json exists already" in ran.err and scores.read_bytes() == before
    assert not html.exists()


def test_page_shows_words_as_words(tmp_path):
    cases = (Case("k", "</script><b>bold", np.zeros((4, 4, 3), np.uint8), "<i>"),)
    generate(Benchmark("own", cases, ()), make_editor("identity"), tmp_path / "<u>")
    score(Benchmark("own", cases, ()), tmp_path / "<u>", ["l1_source"], Backbones())
    write_report(load_runs([tmp_path / "<u>"]), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert not set(re.findall(r"<(?:u|i)>|<b>bold", page)) and page.count("</script>") == 1


def test_different_protocols_do_not_compare_silently(tmp_path, procedural_runs):
    generate(plain(), make_editor("identity"), tmp_path / "own")
    score(plain(), tmp_path / "own", ["l1"], Backbones())
    folders = [procedural_runs / "oracle", tmp_path / "own"]
    with pytest.raises(ValueError, match="different protocols.*benchmark.*--allow-different"):
        load_runs(folders)
    runs = load_runs(folders, allow_different=True)
    write_report(runs, tmp_path / "page.html")
    assert "Their numbers do not compare" in (tmp_path / "page.html").read_text()


def test_a_score_file_changed_by_hand_is_refused(tmp_path):
    generate(plain(), make_editor("identity"), tmp_path)
    score(plain(), tmp_path, ["l1"], Backbones())
    path = tmp_path / "scores.json"
    path.write_text(path.read_text().replace('"num_cases": 6', '"num_cases": 7'))
    with pytest.raises(ValueError, match="changed by hand"):
        load_runs([tmp_path])
    with pytest.raises(ValueError, match="is no score file"):
        load_runs([tmp_path / "nowhere"])
    (tmp_path / "old").mkdir()
    sound = json.loads(path.read_text().replace('"num_cases": 7', '"num_cases": 6'))
    (tmp_path / "old/scores.json").write_text(json.dumps(sound))
    assert load_runs([tmp_path / "old"])[0].scores == sound
    better = json.loads(json.dumps(sound))
    better["overall"]["l1"]["mean"] = 0.0
    for changed in (better, {name: value for name, value in sound.items() if name != "rows"}):
        (tmp_path / "old/scores.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match="changed by hand or is damaged"):
            load_runs([tmp_path / "old"])
    del sound["scores_sha256"]  # as an earlier version wrote it
    for other in (sound, [], "text"):
        (tmp_path / "old/scores.json").write_text(json.dumps(other))
        with pytest.raises(ValueError, match="is no score file .*run `varedit evaluate run`"):
            load_runs([tmp_path / "old"])


def test_pictures_that_are_gone_or_damaged(tmp_path):
    generate(plain(2), make_editor("identity"), tmp_path / "run")
    score(plain(2), tmp_path / "run", ["l1"], Backbones())
    runs = load_runs([tmp_path / "run"])
    result_path(tmp_path / "run", "k0").unlink()
    write_report(runs, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().count("<div>no picture</div>") == 1
    result_path(tmp_path / "run", "k1").write_bytes(b"junk")
    with pytest.raises(ValueError, match="k1.png is damaged .*run `varedit evaluate run` again"):
        write_report(runs, tmp_path / "page.html", overwrite=True)


def test_a_report_that_cannot_be_written(tmp_path):
    generate(plain(1), make_editor("identity"), tmp_path / "run")
    score(plain(1), tmp_path / "run", ["l1"], Backbones())
    runs = load_runs([tmp_path / "run"])
    (tmp_path / "file").write_text("")
    for page in (tmp_path / "run", tmp_path / "file/page.html"):
        with pytest.raises(ValueError, match="cannot be written"):
            write_report(runs, page)
    with pytest.raises(ValueError, match="overwritten by its own .json file: name it page.html"):
        write_report(runs, tmp_path / "page.json")
    assert not list(tmp_path.rglob("*.tmp"))


def test_paired_test_sees_a_shift_and_no_shift(tmp_path):
    for name, editor in (("a", "identity"), ("b", "oracle"), ("c", "identity")):
        generate(plain(12), make_editor(editor), tmp_path / name)
        score(plain(12), tmp_path / name, ["l1"], Backbones())
    first, second, third = load_runs([tmp_path / name for name in "abc"])
    better = paired(first, second, "l1")
    assert better.difference == pytest.approx(-10 / 255, abs=1e-6) and better.p < 0.002
    assert (better.wins, better.losses, better.n) == (12, 0, 12)  # lower is better there
    assert paired(first, third, "l1").p == 1


def test_ends_of_an_axis_are_round_and_hold_all():
    assert axis([0.1], [0.9])[:2] == (0.0, 1.0)
    low, high, ticks = axis([58.2, 59.0], [59.9, 60.0])
    assert low <= 58.2 and high >= 60 and 50 < low and all(low <= tick <= high for tick in ticks)
    assert axis([0.0], [0.0])[:2] == (0, 1) and axis([60.0], [60.0])[:2] == (59.5, 60.5)
    assert axis([-0.2], [0.1])[:2] == pytest.approx((-0.2, 0.1))


def test_a_plot_has_a_dot_for_each_mean_and_escapes_labels():
    mean = {"mean": 0.5, "low": 0.4, "high": 0.7, "n": 4}
    drawn = dots([{"<a>": [mean, None], "b": [mean, mean]}, {}], ["one", "two & three"])
    assert drawn.count("<circle") == 3 and "<a>" not in drawn and "two &amp; three, b: 0.500" in drawn
    assert dots([{}], ["one"]) == ""


def test_paper_table(tmp_path, capsys):
    out = command("evaluate", "paper-table", capsys=capsys).out
    assert "VAREdit 512 px" in out and "7.892" in out
    assert len(TABLE) == 14 and all(len(values) == len(COLUMNS) for _, _, values in TABLE)
    scores = {"protocol": {"benchmark": "pie-bench"}, "overall": {"clip_whole": {"mean": 0.25}}}
    assert own_row(scores)[5] == 0.25 and len(own_row(scores)) == len(COLUMNS)
    with pytest.raises(ValueError, match="no column"):
        own_row({"protocol": {"benchmark": "own"}, "overall": {}})
    places = standing((None, 0.3, None, None, None, 0.25, 0.1, 99.0, None, None, None))
    assert places[1] == 1 and places[5] == 8 and places[6] == 15 and places[7] == 1 and places[0] is None
    scores = {"protocol": {"benchmark": "emu-edit"}, "overall": {"clip_dir": {"mean": 0.1}}, "groups": {}}
    scores["protocol_sha256"] = digest(scores["protocol"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/scores.json").write_text(json.dumps(scores | {"scores_sha256": digest(scores)}))
    out = command("evaluate", "paper-table", tmp_path / "mine", capsys=capsys).out
    assert re.search(r"mine .*0\.100", out) and "6th" in out  # below five methods, above VAREdit 512 px
