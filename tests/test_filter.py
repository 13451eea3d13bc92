"""The filter against a real server on this machine that speaks the chat API, with all its moods."""

import base64
import contextlib
import dataclasses
import io
import json
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from varedit.cli.data import app
from varedit.data.faults import Skipped
from varedit.data.filter import Verdict, estimate, judge_pairs, read_verdicts, selected
from varedit.data.judge_client import JudgeClient, JudgeError, estimate_tokens, json_answer
from varedit.data.lint import LintOptions, lint
from varedit.data.lint_report import read_flagged, write_json
from varedit.data.readers import read
from varedit.data.record import Record, write_folder

Reply = tuple[int, object, dict[str, str]]  # status, body, headers
YES = json.dumps({"difference": "a patch", "matches": True, "sharp": True})


class Judge(ThreadingHTTPServer):
    """Answers by what the instruction says: "bad" does not match, "soft" is not sharp; everything else is fine."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[dict] = []
        self.keys: list[str | None] = []
        self.answered: Counter[str] = Counter()
        self.mood: Callable[[int, str], Reply | None] = lambda number, text: None
        self.lock = threading.Lock()
        self.under_way = self.most_under_way = 0
        self.delay = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Judge

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        judge = self.server
        text = body["messages"][1]["content"][-1]["text"]
        with judge.lock:
            number = len(judge.requests)
            judge.requests.append(body)
            judge.keys.append(self.headers.get("Authorization"))
            judge.under_way += 1
            judge.most_under_way = max(judge.most_under_way, judge.under_way)
        time.sleep(judge.delay)
        status, content, headers = judge.mood(number, text) or (200, answer_to(text), {})
        if isinstance(content, str) and status == 200:
            with judge.lock:
                judge.answered[text] += 1
            content = {
                "choices": [{"message": {"role": "assistant", "content": content}}],
                "usage": {"prompt_tokens": 100, "completion_tokens": 10},
            }
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        with judge.lock:
            judge.under_way -= 1
        if self.path != "/v1/chat/completions":
            status = 404
        try:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError:
            pass  # the other side was killed, or lost patience

    def log_message(self, *_: object) -> None:
        pass


def answer_to(text: str) -> str:
    return json.dumps({"difference": "a patch", "matches": "bad" not in text, "sharp": "soft" not in text})


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[Judge]:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("VAREDIT_JUDGE_API_KEY", raising=False)
    server = Judge()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def client_of(judge: Judge, **options) -> JudgeClient:
    return JudgeClient(judge.url, "some-model", **{"backoff_s": 0.001, "timeout_s": 20.0, **options})


def make_records(count: int) -> list[Record]:
    words = ("fine", "bad", "soft", "bad and soft")
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (count + 1, 32, 48, 3), np.uint8)
    return [
        Record(pictures[i], pictures[i + 1], (f"{words[i % 4]} {i}", "other words"), origin=f"pair {i}")
        for i in range(count)
    ]


def test_verdicts(judge: Judge, tmp_path: Path) -> None:
    records = make_records(8)
    client = client_of(judge)
    seen: list[Verdict] = []
    report = judge_pairs(records, client, tmp_path / "out.jsonl", on_verdict=seen.append)
    assert report.num_kept == 2 and report.dropped == {"does not match": 4, "not sharp": 2}
    assert report.num_calls == len(judge.requests) == 8
    assert client.num_tokens == [800, 80]
    verdicts = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [verdict["position"] for verdict in verdicts] == list(range(8)) == sorted(v.position for v in seen)
    assert [verdict["keep"] for verdict in verdicts] == [True, False, False, False] * 2
    assert (verdicts[2]["matches"], verdicts[2]["sharp"], verdicts[2]["difference"]) == (True, False, "a patch")
    chosen = list(selected(records, read_verdicts(tmp_path / "out.jsonl")))
    assert [record.origin for record in chosen] == ["pair 0", "pair 4"]


def test_what_is_asked(judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAREDIT_JUDGE_API_KEY", "secret")
    (record,) = make_records(1)
    large = Record(np.full((2000, 1000, 3), 200, np.uint8), record.target, ("fine {braces}",))
    judge_pairs([large], client_of(judge), tmp_path / "out.jsonl")
    (request,) = judge.requests
    assert judge.keys == ["Bearer secret"]
    assert (request["model"], request["temperature"]) == ("some-model", 0)
    before, after, question = request["messages"][1]["content"]
    assert "Instruction: fine {braces}\n" in question["text"] and '{"difference"' in question["text"]
    shapes = []
    for part in (before, after):
        kind, data = part["image_url"]["url"].split(",", 1)
        assert kind == "data:image/jpeg;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            shapes.append(image.size)
    assert shapes == [(384, 768), (48, 32)]


def test_pictures_that_cannot_be_read_cost_nothing(judge: Judge, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"nothing")
    (good,) = make_records(1)
    broken = Record(tmp_path / "broken.png", good.target, ("fine",), origin="b")
    items = [Skipped("a", "missing image", "gone"), broken, good]
    report = judge_pairs(items, client_of(judge), tmp_path / "out.jsonl")
    assert report.num_kept == 1 and report.dropped == {"missing image": 1, "unreadable image": 1}
    assert len(judge.requests) == 1


@pytest.mark.parametrize(
    "failure",
    [
        (429, {"error": "slow down"}, {"Retry-After": "0.01"}),
        (429, {"error": "slow down"}, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}),
        (500, b"oops", {}),
        (503, b"", {}),
        (200, b"<html>a proxy's page</html>", {}),
        (200, {"choices": []}, {}),
        (200, ["no", "object"], {}),
    ],
    ids=lambda failure: f"{failure[0]}",
)
def test_passing_failures_are_tried_again(judge: Judge, tmp_path: Path, failure: Reply) -> None:
    judge.mood = lambda number, text: failure if number % 3 != 2 else None
    client = client_of(judge, max_retries=30)
    report = judge_pairs(make_records(4), client, tmp_path / "out.jsonl", num_workers=2)
    assert report.num_kept == 1 and report.dropped.total() == 3
    assert set(judge.answered.values()) == {1} and len(judge.answered) == 4


def test_a_silent_server_is_given_up(judge: Judge, tmp_path: Path) -> None:
    judge.mood = lambda number, text: time.sleep(1.0)
    client = client_of(judge, timeout_s=0.05, max_retries=1)
    with pytest.raises(JudgeError, match=r"gave no answer in 2 tries \(.*timed out.*\); start it"):
        judge_pairs(make_records(1), client, tmp_path / "out.jsonl")
    nobody = JudgeClient("http://127.0.0.1:9", "m", max_retries=0)
    with pytest.raises(JudgeError, match="gave no answer in 1 tries"):
        judge_pairs(make_records(1), nobody, tmp_path / "out.jsonl")


@pytest.mark.parametrize(
    ("status", "fix"), [(401, "set a valid key"), (404, "usually it ends in /v1"), (400, "accepts")]
)
def test_refusals_stop_at_once(judge: Judge, tmp_path: Path, status: int, fix: str) -> None:
    judge.mood = lambda number, text: (status, {"error": {"message": "no\nway"}}, {})
    with pytest.raises(JudgeError, match=fix) as error:
        judge_pairs(make_records(30), client_of(judge), tmp_path / "out.jsonl", num_workers=2)
    assert "\n" not in str(error.value) and "no\\nway" in str(error.value)
    assert len(judge.requests) <= 4


def test_nonsense_is_asked_again_once(judge: Judge, tmp_path: Path) -> None:
    nonsense = iter(["I think so!", '{"matches": "yes", "sharp": true}'])
    judge.mood = lambda number, text: (200, next(nonsense, YES), {}) if "0" in text else (200, "no idea", {})
    records = [make_records(2)[i] for i in (0, 1)]
    report = judge_pairs(records, client_of(judge), tmp_path / "out.jsonl", num_workers=1)
    assert report.dropped == {"no valid answer": 2} and len(judge.requests) == 4
    roles = [message["role"] for message in judge.requests[1]["messages"]]
    assert roles == ["system", "user", "assistant", "user"]
    (tmp_path / "out.jsonl").unlink()
    again = judge_pairs(records, client_of(judge), tmp_path / "out.jsonl")
    assert again.num_calls == 0 and again.dropped == {"no valid answer": 2}


def test_answers_with_thoughts_and_fences() -> None:
    thought = '<think>maybe {"matches": false}? or {x}</think>\n```json\n{"difference": "a {b}", "matches": true}\n```'
    assert json_answer(thought) == {"difference": "a {b}", "matches": True}
    assert json_answer("{{") is None and json_answer("") is None and json_answer("[1]") is None


def test_interrupted_and_continued_pays_once(judge: Judge, tmp_path: Path) -> None:
    """The server refuses in the middle: what was answered before is not asked again."""
    records = make_records(20)
    judge.mood = lambda number, text: (401, {}, {}) if 7 <= number < 12 else None
    with pytest.raises(JudgeError):
        judge_pairs(records, client_of(judge), tmp_path / "out.jsonl", num_workers=3)
    judge.mood = lambda number, text: None
    report = judge_pairs(records, client_of(judge), tmp_path / "out.jsonl", num_workers=3)
    assert len(judge.answered) == 20 and set(judge.answered.values()) == {1}
    assert report.num_kept == 5 and report.num_calls == 13
    reference = (tmp_path / "out.jsonl").read_text()
    again = judge_pairs(records, client_of(judge), tmp_path / "out.jsonl")
    assert again.num_calls == 0 and (tmp_path / "out.jsonl").read_text() == reference
    # Without the verdicts, the cache alone still knows every answer; another model is another question.
    judge_pairs(records, client_of(judge), tmp_path / "new.jsonl", cache=tmp_path / "out.jsonl.cache")
    assert judge.answered.total() == 20 and (tmp_path / "new.jsonl").read_text() == reference
    other = JudgeClient(judge.url, "other-model")
    judge_pairs(records[:2], other, tmp_path / "other.jsonl", cache=tmp_path / "out.jsonl.cache")
    assert judge.answered.total() == 22


def test_the_same_pair_twice_is_paid_once(judge: Judge, tmp_path: Path) -> None:
    judge.delay = 0.02
    (record,) = make_records(1)
    report = judge_pairs([record] * 12, client_of(judge), tmp_path / "out.jsonl", num_workers=6)
    assert report.num_kept == 12 and len(judge.requests) == 1


def test_requests_run_side_by_side(judge: Judge, tmp_path: Path) -> None:
    judge.delay = 0.05
    judge_pairs(make_records(16), client_of(judge), tmp_path / "out.jsonl", num_workers=4)
    assert 2 <= judge.most_under_way <= 4


def test_killed_and_continued(judge: Judge, tmp_path: Path) -> None:
    """SIGKILL at any moment loses at most the answers under way."""
    write_folder(make_records(40), tmp_path / "set")
    judge.delay = 0.05
    command = [sys.executable, "-c", "import sys; from varedit.cli.data_commands import app; app(sys.argv[1:])"]
    command += ["filter", str(tmp_path / "set"), "--judge-url", judge.url, "--judge-model", "m"]
    command += ["--output", str(tmp_path / "out.jsonl"), "--num-workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(judge.requests) < 10 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 10 <= len(judge.requests) < 40
    with (tmp_path / "out.jsonl").open("ab") as lines:
        lines.write(b'{"position": 3, "ori')  # as if the last line had been torn
    judge.delay = 0.0
    client = JudgeClient(judge.url, "m")
    report = judge_pairs(read(tmp_path / "set"), client, tmp_path / "out.jsonl")
    assert report.num_kept == 10 and report.dropped.total() == 30
    assert len(judge.requests) <= 40 + 2
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 40


def test_verdicts_of_another_source_are_refused(judge: Judge, tmp_path: Path) -> None:
    records = make_records(3)
    judge_pairs(records, client_of(judge), tmp_path / "out.jsonl")
    with pytest.raises(ValueError, match="is about 'pair 0', the source has 'pair 2'"):
        judge_pairs(records[::-1], client_of(judge), tmp_path / "out.jsonl")
    with pytest.raises(ValueError, match="is about 'pair 0'"):
        list(selected(records[::-1], None, {0: ("pair 0", None)}))
    (tmp_path / "notes.txt").write_text("hello\nworld\n")
    with pytest.raises(ValueError, match="line 1 is no verdict"):
        judge_pairs(records, client_of(judge), tmp_path / "notes.txt")
    for text in ("hello", '{"a": 1}'):  # one line without an end: no verdict that a crash tore
        (tmp_path / "notes.txt").write_text(text)
        with pytest.raises(ValueError, match="line 1 is no verdict"):
            judge_pairs(records, client_of(judge), tmp_path / "notes.txt")
        assert (tmp_path / "notes.txt").read_text() == text
    (tmp_path / "bad.cache").write_text("this is no database, but it is long enough to look at" * 20)
    with pytest.raises(ValueError, match="cannot be used"):
        judge_pairs(records, client_of(judge), tmp_path / "new.jsonl", cache=tmp_path / "bad.cache")


def test_verdicts_and_findings_know_their_instruction(judge: Judge, tmp_path: Path) -> None:
    """Origins of own tables are line numbers: after a line is deleted, each is the next pair's."""
    rows = make_records(4)
    numbered = [dataclasses.replace(record, origin=f"line {i + 1}") for i, record in enumerate(rows)]
    shifted = [dataclasses.replace(record, origin=f"line {i + 1}") for i, record in enumerate(rows[1:])]
    judge_pairs(numbered, client_of(judge), tmp_path / "v.jsonl")
    verdicts = read_verdicts(tmp_path / "v.jsonl")
    assert [verdict.instruction for verdict in verdicts.values()] == [record.instruction for record in rows]
    words = "on pair 0 is about 'fine 0', the source has 'bad 1'"
    for attempt in (
        lambda: judge_pairs(shifted, client_of(judge), tmp_path / "v.jsonl"),
        lambda: estimate(shifted, tmp_path / "v.jsonl"),
        lambda: list(selected(shifted, verdicts)),
    ):
        with pytest.raises(ValueError, match=f"the verdict {words}"):
            attempt()
    write_json(lint(numbered, LintOptions(min_side=99)), "here", tmp_path / "l.json")
    flagged = read_flagged(tmp_path / "l.json")
    assert list(selected(numbered, None, flagged)) == []
    with pytest.raises(ValueError, match=f"the finding {words}"):
        list(selected(shifted, None, flagged))


def test_a_pair_that_was_repaired_is_judged_again(judge: Judge, tmp_path: Path) -> None:
    records = make_records(2)
    broken = [Skipped("pair 0", "missing image", "gone"), records[1]]
    judge_pairs(broken, client_of(judge), tmp_path / "v.jsonl")
    assert read_verdicts(tmp_path / "v.jsonl")[0].instruction == ""
    assert judge_pairs(records, client_of(judge), tmp_path / "v.jsonl").num_calls == 1
    assert [item.origin for item in selected(records, read_verdicts(tmp_path / "v.jsonl"))] == ["pair 0"]
    assert list(selected(records, None, {0: ("pair 0", "")})) == records[1:]  # a finding of then still leaves it out


def test_verdicts_of_earlier_versions_are_read(judge: Judge, tmp_path: Path) -> None:
    records = make_records(4)
    judge_pairs(records[:3], client_of(judge), tmp_path / "v.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "v.jsonl").read_text().splitlines()]
    old = [{key: line[key] for key in line if key not in ("instruction", "model")} for line in lines]
    (tmp_path / "v.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    report = judge_pairs(records, client_of(judge), tmp_path / "v.jsonl")
    assert report.num_calls == 1 and report.num_kept == 1 and len(judge.requests) == 4
    assert [record.origin for record in selected(records, read_verdicts(tmp_path / "v.jsonl"))] == ["pair 0"]


def test_an_unfinished_filter_selects_nothing(judge: Judge, tmp_path: Path) -> None:
    records = make_records(3)
    judge_pairs(records[:2], client_of(judge), tmp_path / "v.jsonl")
    with pytest.raises(ValueError, match=r"pair 2 \('pair 2'\) has no verdict: run varedit data filter again"):
        list(selected(records, read_verdicts(tmp_path / "v.jsonl")))


def test_another_model_is_refused(judge: Judge, tmp_path: Path) -> None:
    records = make_records(2)
    judge_pairs(records, client_of(judge), tmp_path / "v.jsonl")
    before = (tmp_path / "v.jsonl").read_text()
    with pytest.raises(ValueError, match="holds verdicts of 'some-model', not of 'other': use that model"):
        judge_pairs(records, JudgeClient(judge.url, "other"), tmp_path / "v.jsonl")
    assert (tmp_path / "v.jsonl").read_text() == before and len(judge.requests) == 2


def test_a_cache_that_cannot_be_written_loses_no_answer(judge: Judge, tmp_path: Path) -> None:
    records = make_records(30)
    judge_pairs(records[:1], client_of(judge), tmp_path / "v.jsonl")
    with contextlib.closing(sqlite3.connect(tmp_path / "v.jsonl.cache")) as database:
        database.execute("CREATE TRIGGER full BEFORE INSERT ON answers BEGIN SELECT RAISE(FAIL, 'disk is full'); END")
    with pytest.raises(ValueError, match=r"v\.jsonl\.cache cannot be written \(disk is full\): make room") as error:
        judge_pairs(records, client_of(judge), tmp_path / "v.jsonl", num_workers=2)
    assert "\n" not in str(error.value)
    assert len(read_verdicts(tmp_path / "v.jsonl")) == len(judge.requests) < 10
    with contextlib.closing(sqlite3.connect(tmp_path / "v.jsonl.cache")) as database:
        database.execute("DROP TRIGGER full")
    judge_pairs(records, client_of(judge), tmp_path / "v.jsonl")
    assert len(judge.requests) == 30


def test_a_key_is_stripped_or_refused_unseen(judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret\r\n")
    judge_pairs(make_records(1), client_of(judge), tmp_path / "v.jsonl")
    assert judge.keys == ["Bearer secret"]
    for key in ("sec\nret", "sec\x7fret", "secr\u2026et"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(ValueError, match="the key in OPENAI_API_KEY holds a control character") as error:
            client_of(judge)
        assert key not in str(error.value) and "sec" not in str(error.value)


def test_estimate(judge: Judge, tmp_path: Path) -> None:
    records = [Record(np.zeros((1536, 768, 3), np.uint8), np.zeros((56, 28, 3), np.uint8), ("x",)) for _ in range(10)]
    expected = estimate(records, price_in=2.0, price_out=10.0)
    images = estimate_tokens(0, [(768, 384), (56, 28)])  # as they are sent
    words = expected.prompt_tokens // 10 - images
    assert expected.num_calls == 10 and 100 < words < 400
    assert expected.cost == pytest.approx((expected.prompt_tokens * 2 + expected.answer_tokens * 10) / 1e6)
    assert "20 images" in str(expected) and estimate(records).cost is None
    judge_pairs(records[:4], client_of(judge), tmp_path / "out.jsonl")
    assert estimate(records, tmp_path / "out.jsonl").num_calls == 6
    with pytest.raises(ValueError, match="price_in is -1"):
        estimate(records, price_in=-1)


# ---- commands --------------------------------------------------------------------------------------------------------
def run(*arguments: object) -> tuple[str, str]:
    """Standard output, and the message of the error if there was one."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])  # varedit data ...
    if result.exception is not None and not isinstance(result.exception, ValueError):
        raise result.exception
    return result.output, str(result.exception or "")


def test_commands_from_raw_to_packed(judge: Judge, tmp_path: Path) -> None:
    records = []
    for record in make_records(4):
        target = record.source.copy()
        target[8:20, 8:24] = 255
        records.append(dataclasses.replace(record, target=target))
    records[3] = Record(records[3].source, records[3].source, ("same",), origin="same")
    write_folder(records, tmp_path / "raw")
    out, error = run(
        "lint", tmp_path / "raw", "--report", tmp_path / "l.json", "--html", tmp_path / "l.html", "--min-side", 8
    )
    assert not error and "4 pairs, 1 with findings (unchanged 1)" in out
    assert (tmp_path / "l.html").stat().st_size > 1000
    arguments = ("filter", tmp_path / "raw", "--judge-url", judge.url, "--judge-model", "m", "-o", tmp_path / "v.jsonl")
    out, error = run(*arguments, "--dry-run", "--price-in", 1, "--price-out", 1)
    assert not error and "estimate: 4 pairs to judge, 8 images" in out and not judge.requests
    out, error = run(*arguments, "--price-in", 1e6, "--price-out", 1)
    assert "add --yes, or raise --max-cost" in error and not judge.requests
    out, error = run(*arguments, "--price-in", 1e6, "--yes")
    assert not error and "2 kept, 2 dropped" in out and "4 requests" in out
    packing = (
        "pack",
        tmp_path / "raw",
        "-o",
        tmp_path / "out",
        "--only",
        tmp_path / "v.jsonl",
        "--without",
        tmp_path / "l.json",
    )
    out, error = run(*packing)
    assert not error and "1 pairs in 1 shards" in out
    assert [record.origin for record in read(tmp_path / "out")] == ["pair 0"]
    out, error = run(*packing)
    assert not error and "checksums hold" in out
    (shard,) = (tmp_path / "out").glob("*.tar")
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert "does not have the checksum" in run(*packing)[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("lint", "nowhere", "--report", "r.json"), "source nowhere does not exist: check the path"),
        (("lint", ".", "--report", "r.json", "--language", "xx"), "language 'xx' is unknown: use one of en, de"),
        (("lint", ".", "--report", "r.json", "--format", "zip"), "format 'zip' is unknown: use one of"),
        (("pack", "nowhere", "-o", "out"), "source nowhere does not exist"),
        (("pack", ".", "-o", "out", "--only", "gone.jsonl"), "gone.jsonl do not exist"),
        (("pack", ".", "-o", "out", "--without", "gone.json"), "gone.json is no lint report"),
        (("filter", ".", "--judge-url", "localhost", "--judge-model", "m", "-o", "v"), "'localhost' is no address"),
        (("filter", ".", "--judge-url", "http://x", "--judge-model", "", "-o", "v"), "judge model is empty"),
        (
            ("filter", ".", "--judge-url", "http://x", "--judge-model", "m", "-o", "v", "--format", "csv"),
            ". cannot be read or written (Is a directory)",
        ),
    ],
)
def test_bad_input_is_one_line(arguments: tuple, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    error = run(*arguments)[1]
    assert message in error and "\n" not in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("lint", "raw", "--report", "taken/r.json"),
        ("lint", "raw", "--report", "r.json", "--html", "raw"),
        ("lint", "raw", "--report", "raw/pairs.jsonl"),
        ("pack", "raw", "-o", "taken"),
        ("filter", "raw", "--judge-url", "http://x", "--judge-model", "m", "-o", "raw"),
        ("synth", "--count", "1", "--size", "128", "-o", "taken"),
        ("synth", "--count", "1", "--size", "128", "-o", "taken/deep"),
    ],
)
def test_an_output_in_the_way_is_named(arguments: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_folder(make_records(2), tmp_path / "raw")
    (tmp_path / "taken").write_text("here")
    before = sorted(tmp_path.rglob("*"))
    _, error = run(*arguments)
    place = arguments[-1] if arguments[-1] != "taken/deep" else "taken"
    assert place in error and re.search("cannot be|exists already", error) and "\n" not in error
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "taken").read_text() == "here"
