"""Generation, scoring and reports, from the command and in process."""

import hashlib
import json
import re

import numpy as np
import pytest
from PIL import Image

from varedit.cli import main
from varedit.evaluation.benchmarks import load
from varedit.evaluation.cases import Benchmark, Case
from varedit.evaluation.editors import EditFailed, VAREditEditor, make_editor
from varedit.evaluation.features import Backbones
from varedit.evaluation.generate import case_seed, generate, read_manifest, result_path
from varedit.evaluation.paper import COLUMNS, TABLE, own_row
from varedit.evaluation.report import load_runs, paired, write_report
from varedit.evaluation.scores import METRICS, bootstrap, check_metrics, score


class Counting:
    """Adds the seed's parity to every pixel; fails on keys it is told to; may be interrupted."""

    concurrent = True

    def __init__(self, fail=(), stop_after=None):
        self.settings, self.calls, self.fail, self.stop_after = {"editor": "counting"}, [], set(fail), stop_after

    def edit(self, case, source, seed):
        if self.stop_after is not None and len(self.calls) >= self.stop_after:
            raise KeyboardInterrupt
        self.calls.append(case.key)
        if case.key in self.fail:
            raise EditFailed("out of memory")
        return Image.fromarray(np.asarray(source) // 2 + seed % 100)


def plain(count=6, **more):
    cases = tuple(
        Case(f"k{i}", f"edit {i}", np.full((16, 16, 3), 20 * i, np.uint8), "even" if i % 2 == 0 else "odd",
             target=np.full((16, 16, 3), 20 * i + 10, np.uint8))
        for i in range(count)
    )  # fmt: skip
    return Benchmark("own", cases, ("l1", "l1_source"), **more)


def command(*arguments, code=0, capsys=None):
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert ended.value.code == code
    return capsys.readouterr() if capsys is not None else None


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        generate(plain(), Counting(stop_after=4), tmp_path)
    editor = Counting()
    done = generate(plain(), editor, tmp_path)
    assert (done.done, done.skipped, done.failed) == (2, 4, {}) and editor.calls == ["k4", "k5"]
    straight = tmp_path / "straight"
    generate(plain(), Counting(), straight)
    for key in read_manifest(straight):
        assert result_path(straight, key).read_bytes() == result_path(tmp_path, key).read_bytes()


def test_manifest_says_what_it_took(tmp_path):
    generate(plain(1), Counting(), tmp_path, seed=3)
    (row,) = read_manifest(tmp_path).values()
    assert row["status"] == "ok" and row["seed"] == case_seed(3, "k0") and (row["width"], row["height"]) == (16, 16)
    assert row["seconds"] >= 0 and row["peak_memory_mib"] > 10
    assert row["sha256"] == hashlib.sha256(result_path(tmp_path, "k0").read_bytes()).hexdigest()


def test_damage_is_done_again(tmp_path):
    """A manifest line cut off in the middle, a result overwritten, a case that asks for something else now."""
    generate(plain(4), Counting(), tmp_path)
    manifest = tmp_path / "manifest.jsonl"
    lines = manifest.read_text().splitlines()
    manifest.write_text("\n".join(lines)[:-20])
    Image.new("RGB", (3, 3)).save(result_path(tmp_path, "k0"))
    changed = list(plain(4).cases)
    changed[1] = Case("k1", "something else", changed[1].source, "odd", target=changed[1].target)
    editor = Counting()
    generate(Benchmark("own", tuple(changed), ("l1",)), editor, tmp_path)
    assert editor.calls == ["k0", "k1", "k3"]
    again = Counting()
    generate(Benchmark("own", tuple(changed), ("l1",)), again, tmp_path)
    assert again.calls == []


def test_failures_are_counted_named_and_tried_again(tmp_path):
    done = generate(plain(), Counting(fail=["k2"]), tmp_path)
    assert done.failed == {"k2": "out of memory"}
    result = score(plain(problems=(("row 9", "no picture"),)), tmp_path, ["l1"], Backbones())
    assert result["cases"]["total"] == 7 and result["cases"]["scored"] == 5
    assert {(one["key"], one["reason"]) for one in result["cases"]["failed"]} == {
        ("row 9", "no picture"), ("k2", "no result: out of memory"),
    }  # fmt: skip
    assert result["overall"]["l1"]["n"] == 5 and "k2" not in {row["key"] for row in result["rows"]}
    editor = Counting()
    generate(plain(), editor, tmp_path)
    assert editor.calls == ["k2"]


def test_missing_source_fails_its_case_only(tmp_path):
    cases = (Case("gone", "edit", tmp_path / "gone.png"), *plain(1).cases)
    done = generate(Benchmark("own", cases, ("l1_source",)), Counting(), tmp_path / "out")
    assert done.done == 1 and "gone.png" in done.failed["gone"]


def test_another_run_in_the_folder_is_refused(tmp_path):
    generate(plain(1), Counting(), tmp_path)
    with pytest.raises(ValueError, match="holds a run with seed 0, not 1; choose another --output"):
        generate(plain(1), Counting(), tmp_path, seed=1)
    with pytest.raises(ValueError, match="editor"):
        generate(plain(1), make_editor("identity"), tmp_path)


def test_shards_and_threads_give_the_same_folder(tmp_path):
    generate(plain(), Counting(), tmp_path / "one")
    for part in range(3):
        generate(plain(), Counting(), tmp_path / "parts", shard=(part, 3))
    generate(plain(), Counting(), tmp_path / "threads", workers=3)
    for other in ("parts", "threads"):
        for case in plain().cases:
            name = result_path(tmp_path / other, case.key)
            assert name.read_bytes() == result_path(tmp_path / "one", case.key).read_bytes()


def chained(scored=(True, True, True)):
    source, mask = np.full((16, 16, 3), 100, np.uint8), np.zeros((16, 16), bool)
    return Benchmark("own", tuple(
        Case(f"t{i}", "go on", source, mask=mask, previous=f"t{i - 1}" if i else None, scored=scored[i])
        for i in range(3)
    ), ("drift",))  # fmt: skip


def test_chained_turns_edit_the_turn_before(tmp_path):
    generate(chained(), Counting(), tmp_path)
    values = [int(np.asarray(Image.open(result_path(tmp_path, f"t{i}")))[0, 0, 0]) for i in range(3)]
    expected, value = [], 100
    for i in range(3):
        value = (value // 2 + case_seed(0, f"t{i}") % 100) % 256
        expected.append(value)
    assert values == expected
    result = score(chained((False, True, True)), tmp_path, ["drift"], Backbones())
    assert [row["scores"]["drift"] for row in result["rows"]] == [abs(expected[1] - 100), abs(expected[2] - 100)]
    assert result["cases"]["total"] == 2


def test_a_new_turn_makes_the_turns_after_it_new(tmp_path):
    generate(chained(), Counting(), tmp_path)
    Image.new("RGB", (3, 3)).save(result_path(tmp_path, "t1"))
    editor = Counting()
    generate(chained(), editor, tmp_path)
    assert editor.calls == ["t1", "t2"]
    broken = tmp_path / "broken"
    assert generate(chained(), Counting(fail=["t0"]), broken).failed["t1"].startswith("the turn before, t0")


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


def test_bootstrap_interval():
    values = [float(i % 2) for i in range(400)]
    mean = bootstrap(values, "a")
    assert mean.mean == 0.5 and mean.n == 400
    assert mean.high - mean.low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.1)
    assert mean == bootstrap(values, "a") and mean != bootstrap(values, "b")


def test_protocol_covers_what_shapes_a_number_and_not_the_editor(tmp_path):
    def protocol(name, benchmark, metrics=("l1",), editor="identity", **models):
        generate(benchmark, make_editor(editor), tmp_path / name)
        return score(benchmark, tmp_path / name, metrics, Backbones(**models))["protocol_sha256"]

    base = protocol("a", plain())
    assert protocol("b", plain(), editor="oracle") == base
    assert protocol("c", plain(5)) != base
    assert protocol("d", plain(), metrics=("l1", "l1_source")) != base
    assert protocol("e", plain(fit="bicubic")) != base
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
    assert ends["identity"]["protocol_sha256"] == ends["oracle"]["protocol_sha256"]
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
    assert page.count('class="case"') == 8 and page.count("<svg") == 6
    assert page.count("data:image/webp;base64,") == 8 * 4  # source, two results, known answer
    assert not re.search(r'(?:src|href)="(?!data:)', page)  # nothing from elsewhere
    report = json.loads(html.with_suffix(".json").read_text())
    success = next(one for one in report["paired"][0]["scores"] if one["metric"] == "success")
    assert success["difference"] == 1 and success["wins"] == 8 and success["p"] < 0.02
    assert "| success | +1.000 (+1.000 to +1.000)" in html.with_suffix(".md").read_text()


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


def test_paired_test_sees_a_shift_and_no_shift(tmp_path):
    for name, editor in (("a", "identity"), ("b", "oracle"), ("c", "identity")):
        generate(plain(12), make_editor(editor), tmp_path / name)
        score(plain(12), tmp_path / name, ["l1"], Backbones())
    first, second, third = load_runs([tmp_path / name for name in "abc"])
    better = paired(first, second, "l1")
    assert better.difference == pytest.approx(-10 / 255, abs=1e-6) and better.p < 0.002
    assert (better.wins, better.losses, better.n) == (12, 0, 12)  # lower is better there
    assert paired(first, third, "l1").p == 1


def test_own_pipeline_resumes_only_with_the_same_settings(tmp_path):
    from varedit.testing import tiny_pipeline

    tiny_pipeline().save_pretrained(tmp_path / "model")
    spec = f"varedit:{tmp_path / 'model'}"
    editor = make_editor(f"{spec}?temperature=0.0", "cpu")
    assert (
        isinstance(editor, VAREditEditor) and editor.settings["temperature"] == 0.0 and editor.settings["size"] == 128
    )
    benchmark = load("procedural", limit=2)
    assert generate(benchmark, editor, tmp_path / "out").done == 2
    assert Image.open(result_path(tmp_path / "out", "00000")).size == (128, 128)
    with pytest.raises(ValueError, match="holds a run with editor"):
        generate(benchmark, make_editor(spec, "cpu"), tmp_path / "out")
    result = score(benchmark, tmp_path / "out", benchmark.metrics, Backbones())
    assert result["overall"]["success"]["mean"] == 0  # random weights


def test_paper_table(capsys):
    out = command("evaluate", "paper-table", capsys=capsys).out
    assert "VAREdit 512 px" in out and "7.892" in out
    assert len(TABLE) == 14 and all(len(values) == len(COLUMNS) for _, _, values in TABLE)
    scores = {"protocol": {"benchmark": "pie-bench"}, "overall": {"clip_whole": {"mean": 0.25}}}
    assert own_row(scores)[5] == 0.25 and len(own_row(scores)) == len(COLUMNS)
    with pytest.raises(ValueError, match="no column"):
        own_row({"protocol": {"benchmark": "own"}, "overall": {}})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--benchmark", "pie-bench", "--editor", "identity"), "needs --data"),
        (("--benchmark", "procedural", "--editor", "magic"), "editor 'magic' is unknown"),
        (("--benchmark", "procedural", "--editor", "identity", "--limit", "0"), "limit is 0"),
        (("--benchmark", "procedural", "--editor", "identity", "--limit", "1", "--shard", "2/2"), "shard '2/2'"),
        (("--benchmark", "procedural", "--editor", "identity", "--limit", "1", "--metrics", "none"), "--judge-url"),
    ],
)
def test_bad_input_of_the_command(arguments, message, tmp_path, capsys):
    captured = command("evaluate", "run", *arguments, "-o", tmp_path / "out", code=2, capsys=capsys)
    assert message in captured.err and len(captured.err.strip().splitlines()) == 1
