"""Generation from the command and in process: interrupted, sharded, in batches, with broken cases."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from varedit import machine
from varedit.cli import main
from varedit.evaluation.benchmarks import load
from varedit.evaluation.cases import Benchmark, Case
from varedit.evaluation.editors import EditFailed, Editor, VAREditEditor, make_editor
from varedit.evaluation.features import Backbones
from varedit.evaluation.generate import case_seed, generate, read_manifest, result_path
from varedit.evaluation.scores import score
from varedit.machine import peak_memory_mib


class Counting(Editor):
    """Halves every pixel and adds the seed; fails on keys it is told to; may be interrupted."""

    concurrent = True

    def __init__(self, fail=(), stop_after=None, batched=False):
        self.settings, self.calls, self.fail, self.stop_after = {"editor": "counting"}, [], set(fail), stop_after
        self.batched, self.batches = batched, []

    def edit_all(self, cases, sources, seeds):
        self.batches.append([case.key for case in cases])
        return super().edit_all(cases, sources, seeds)

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
    assert row["seconds"] >= 0 and row["peak_memory_mib"] > 10 and len(row["run"]) == 16
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


def test_an_output_that_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is no folder that can be written"):
        generate(plain(1), Counting(), tmp_path / "file")


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


@pytest.mark.parametrize("fail", [(), ("k1", "k4")])
def test_batches_give_the_same_folder(tmp_path, fail):
    """In twos; a batch with a case that fails is taken apart, and only that case has no result."""
    generate(plain(5), Counting(fail), tmp_path / "one")
    editor = Counting(fail, batched=True)
    done = generate(plain(5), editor, tmp_path / "twos", batch_size=2)
    assert (done.done, set(done.failed)) == (5 - len(fail), set(fail))
    whole = [batch for batch in editor.batches if len(batch) == 2]
    assert whole == [["k0", "k1"], ["k2", "k3"]] and ["k4"] in editor.batches
    one, twos = ({key: row.get("sha256") for key, row in read_manifest(tmp_path / name).items()}
                 for name in ("one", "twos"))  # fmt: skip
    assert one == twos
    again = Counting(batched=True)
    generate(plain(5), again, tmp_path / "twos", batch_size=2)
    assert sorted(again.calls) == sorted(fail)


def test_chains_go_turn_by_turn_in_a_batch(tmp_path):
    """Two chains and a single case: the first turns together, then the second turns."""
    source = np.full((16, 16, 3), 100, np.uint8)
    follows = {"a1": None, "a2": "a1", "b1": None, "b2": "b1", "c": None}
    cases = tuple(Case(key, "go", source, previous=before) for key, before in follows.items())
    editor = Counting(batched=True)
    generate(Benchmark("own", cases, ()), editor, tmp_path, batch_size=3)
    assert editor.batches == [["a1", "b1", "c"], ["a2", "b2"]]
    generate(Benchmark("own", cases, ()), Counting(), tmp_path / "single")
    for key in follows:
        assert result_path(tmp_path, key).read_bytes() == result_path(tmp_path / "single", key).read_bytes()


def test_keys_that_differ_in_case_alone_are_refused():
    """Their results would be one file where the file system does not tell case apart."""
    source = Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match="two cases 'cat'"):
        Benchmark("own", (Case("Cat", "blur", source), Case("cat", "blur", source)), ())


def test_peak_memory_is_of_where_the_editor_works(monkeypatch):
    assert peak_memory_mib() > 50 and peak_memory_mib("elsewhere") is None
    code = (  # in a process without other children, and small: a child counts as much until it runs its own program
        "import subprocess, sys\n"
        "from varedit.machine import peak_memory_mib\n"
        "before = peak_memory_mib('children')\n"
        "subprocess.run([sys.executable, '-c', 'x = bytearray(100 * 2**20)'], check=True)\n"
        "print(before, peak_memory_mib('children'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before == 0 and 100 <= after <= 250
    monkeypatch.setattr(machine, "resource", None)  # as on Windows
    assert peak_memory_mib() is None and peak_memory_mib("children") is None


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


def test_no_turn_edits_what_an_earlier_call_left_of_a_failed_one(tmp_path):
    generate(chained(), Counting(), tmp_path)
    Image.new("RGB", (3, 3)).save(result_path(tmp_path, "t0"))  # to be done again, which fails
    editor = Counting(fail=["t0"])
    assert set(generate(chained(), editor, tmp_path).failed) == {"t0", "t1", "t2"} and editor.calls == ["t0"]


def test_a_limit_keeps_chains_whole():
    assert [case.key for case in chained().first(1).cases] == ["t0", "t1", "t2"]
    assert [case.key for case in plain(4).first(2).cases] == ["k0", "k1"]


def test_a_case_is_scored_or_failed_not_both(tmp_path):
    """Its target is shown only, and cannot be read."""
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    lines = [
        {"key": key, "source": "a.png", "instruction": "go", "target": target}
        for key, target in (("sound", "a.png"), ("torn", "bad.png"))
    ]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    benchmark = load(str(tmp_path / "own.jsonl"))
    generate(benchmark, Counting(), tmp_path / "out")
    result = score(benchmark, tmp_path / "out", ["l1_source"], Backbones())
    assert [row["key"] for row in result["rows"]] == ["sound"]
    assert [one["key"] for one in result["cases"]["failed"]] == ["torn"]


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
    other = tiny_pipeline()
    other.transformer.register_to_config(position_layout="fixed_offset")  # the same weights
    other.save_pretrained(tmp_path / "other")
    assert make_editor(f"varedit:{tmp_path / 'other'}?temperature=0.0", "cpu").settings != editor.settings
    result = score(benchmark, tmp_path / "out", benchmark.metrics, Backbones())
    assert result["overall"]["success"]["mean"] == 0  # random weights
    generate(benchmark, make_editor(f"{spec}?temperature=0.0", "cpu"), tmp_path / "again", batch_size=2)
    score(benchmark, tmp_path / "again", benchmark.metrics, Backbones())
    assert (tmp_path / "again/scores.json").read_bytes() == (tmp_path / "out/scores.json").read_bytes()


def test_everything_broken_at_once(tmp_path, capsys):
    """Each broken case is counted and named, the sound ones are scored, and mending one edits only that one."""
    for name in ("a", "b", "c", "d", "e"):
        Image.new("RGB", (16, 12), (40, 50, 60)).save(tmp_path / f"{name}.png")
    Image.new("L", (16, 12), 0).save(tmp_path / "mask.png")
    Image.new("L", (9, 9), 0).save(tmp_path / "small.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    rows = {
        "sound": {"source": "a.png", "mask": "mask.png"},
        "missing": {"source": "gone.png", "mask": "mask.png"},
        "truncated": {"source": "cut.png", "mask": "mask.png"},
        "mask-missing": {"source": "b.png", "mask": "none.png"},
        "mask-broken": {"source": "c.png", "mask": "cut.png"},
        "mask-size": {"source": "d.png", "mask": "small.png"},
        "no-result": {"source": "e.png", "mask": "mask.png"},
    }
    lines = [json.dumps({"key": key, "instruction": "go", **row}) for key, row in rows.items()]
    (tmp_path / "own.jsonl").write_text("\n".join([*lines, "{broken"]))
    (tmp_path / "results").mkdir()
    for key in rows:
        if key != "no-result":
            Image.new("RGB", (16, 12) if key != "sound" else (32, 24)).save(tmp_path / f"results/{key}.png")
    arguments = ("evaluate", "run", "--benchmark", tmp_path / "own.jsonl", "--editor", f"folder:{tmp_path / 'results'}",
                 "-o", tmp_path / "out", "--metrics", "l1_source,psnr")  # fmt: skip
    out = command(*arguments, capsys=capsys).out
    assert "4 edited, 0 found done, 3 failed" in out and "1 of 8 cases scored" in out
    cases = json.loads((tmp_path / "out/scores.json").read_text())["cases"]
    assert (cases["total"], cases["scored"], cases["resized"]) == (8, 1, 1)  # the sound result had another size
    reasons = {one["key"]: one["reason"] for one in cases["failed"]}
    expected = {
        "line 8": "JSONDecodeError", "missing": "gone.png", "truncated": "cut.png", "mask-missing": "none.png",
        "mask-broken": "cut.png", "mask-size": "they must have one size", "no-result": "no result",
    }  # fmt: skip
    assert set(reasons) == set(expected)
    assert all(words in reasons[key] for key, words in expected.items()), reasons
    Image.new("RGB", (16, 12)).save(tmp_path / "results/no-result.png")
    out = command(*arguments, capsys=capsys).out
    assert "1 edited, 4 found done, 2 failed" in out and "2 of 8 cases scored" in out


class Inverting:
    """An OpenAI-style image endpoint that counts what it is asked, by prompt."""

    def __init__(self):
        self.asked, self.lock = [], threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                boundary = self.headers["Content-Type"].partition("boundary=")[2].encode()
                parts = [part.partition(b"\r\n\r\n") for part in body.split(b"--" + boundary)]
                form = {head.partition(b'name="')[2].partition(b'"')[0]: data.removesuffix(b"\r\n")
                        for head, _, data in parts}  # fmt: skip
                with outer.lock:
                    outer.asked.append(form[b"prompt"].decode())
                time.sleep(0.01)
                buffer = io.BytesIO()
                Image.fromarray(255 - np.asarray(Image.open(io.BytesIO(form[b"image"])))).save(buffer, "PNG")
                import base64

                text = json.dumps({"data": [{"b64_json": base64.b64encode(buffer.getvalue()).decode()}]})
                self.send_response(200)
                self.end_headers()
                try:
                    self.wfile.write(text.encode())
                except OSError:
                    pass  # the asker was killed

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.mark.slow
def test_a_killed_run_of_200_cases_goes_on_and_repeats_nothing(tmp_path):
    """Processes as a person would start them; SIGKILL in the middle; then two shards at once in another folder."""
    for number in range(200):
        Image.new("RGB", (16, 16), (number, 255 - number, 7)).save(tmp_path / f"{number}.png")
    rows = [{"source": f"{i}.png", "instruction": f"edit {i}", "type": f"kind {i % 3}"} for i in range(200)]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    endpoint = Inverting()

    def start(output, *more):
        arguments = ["evaluate", "run", "--benchmark", tmp_path / "own.jsonl", "--editor", f"openai:{endpoint.url}",
                     "--output", tmp_path / output, *more]  # fmt: skip
        program = [sys.executable, "-c", "from varedit.cli import main; main()", *map(str, arguments)]
        return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)

    first = start("killed")
    while len(endpoint.asked) < 90 and first.poll() is None:
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert first.returncode == -signal.SIGKILL
    finished = {row["key"] for row in read_manifest(tmp_path / "killed").values()}
    assert 80 <= len(finished) < 200 and not (tmp_path / "killed/scores.json").exists()
    asked_before = list(endpoint.asked)
    second = start("killed")
    out, err = second.communicate()
    assert second.returncode == 0, err
    assert f"{200 - len(finished)} edited, {len(finished)} found done, 0 failed" in out
    assert len(endpoint.asked) - len(asked_before) == 200 - len(finished)
    assert len(endpoint.asked) <= 201  # at most the one that was under way when the process died
    assert set(endpoint.asked) == {row["instruction"] for row in rows}

    halves = [start("halves", "--shard", f"{part}/2") for part in range(2)]
    assert [half.wait() for half in halves] == [0, 0]
    whole = start("halves", "--workers", "4")
    assert "0 edited, 200 found done" in whole.communicate()[0]
    endpoint.server.shutdown()
    assert (tmp_path / "halves/scores.json").read_bytes() == (tmp_path / "killed/scores.json").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--benchmark", "pie-bench", "--editor", "identity"), "needs --data"),
        (("--benchmark", "procedural", "--editor", "magic"), "editor 'magic' is unknown"),
        (("--benchmark", "procedural", "--editor", "identity", "--limit", "0"), "limit is 0"),
        (("--benchmark", "procedural", "--editor", "identity", "--limit", "1", "--shard", "2/2"), "shard '2/2'"),
        (("--benchmark", "procedural", "--editor", "identity", "--limit", "1", "--metrics", "none"), "--judge-url"),
        (("--benchmark", "procedural", "--editor", "identity", "--metrics", "beauty", "--limit", "1"), "'beauty'"),
        (("--benchmark", "procedural", "--editor", "identity", "--batch-size", "0"), "batch-size is 0"),
        (("--benchmark", "procedural", "--editor", "identity", "--judge-limit", "3"), "add --judge-prices"),
        (("--benchmark", "procedural", "--editor", "identity", "--judge-prices", "cheap"), "are not two numbers"),
        (
            ("--benchmark", "procedural", "--editor", "identity", "--judge-model", "m"),
            "m means nothing without a judge",
        ),
        (("--benchmark", "procedural", "--editor", "identity", "--judge-rules", "x"), "add --judge-url"),
        (("--benchmark", "procedural", "--editor", "identity", "--judge-repeats", "3"), "add --judge-url"),
        (("--benchmark", "gedit", "--editor", "identity", "--size", "256"), "leave --size out"),
        (("--benchmark", "procedural", "--editor", "identity", "--reader", "seed"), "use NAME=VALUE"),
        (("--benchmark", "procedural", "--editor", "identity", "--limit", "1", "--network", "vgg=x"), "'vgg'"),
        (
            ("--benchmark", "procedural", "--editor", "identity", "--limit", "1", "--preprocessing", "x"),
            "use pie-bench",
        ),
    ],
)
def test_bad_input_of_the_command(arguments, message, tmp_path, capsys):
    captured = command("evaluate", "run", *arguments, "-o", tmp_path / "out", code=2, capsys=capsys)
    assert message in captured.err and len(captured.err.strip().splitlines()) == 1
