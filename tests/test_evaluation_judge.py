"""The judge against a real HTTP server in this process."""

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from varedit.data.judge_client import (
    JudgeAccessError,
    JudgeClient,
    JudgeError,
    JudgeSilentError,
    estimate_tokens,
)
from varedit.evaluation.cases import Benchmark, Case
from varedit.evaluation.chat import MAX_SILENT, Budget, Chat, NoAnswer, Question, parse_scores
from varedit.evaluation.editors import make_editor
from varedit.evaluation.features import Backbones
from varedit.evaluation.generate import generate
from varedit.evaluation.judge import ABOUT, RUBRICS, RULES, Judge, default_rules
from varedit.evaluation.report import load_runs, write_report
from varedit.evaluation.scores import score

BLACK, GREY = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 128, np.uint8)


class Server:
    """Answers chat completions with what `reply(question, number)` gives: a text, or (status, headers, body).

    With None it hangs up.
    """

    def __init__(self, reply):
        self.questions = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.questions.append((self.path, question))
                answer = reply(question, len(outer.questions))
                if answer is None:
                    self.close_connection = True
                    return
                status, headers, body = 200, {}, answer
                if isinstance(answer, tuple):
                    status, headers, body = answer
                else:
                    usage = {"prompt_tokens": 1000, "completion_tokens": 20}
                    body = json.dumps({"choices": [{"message": {"content": answer}}], "usage": usage})
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()


def scores(*values):
    return json.dumps({"score": list(values), "reason": "looked"})


def chat_at(url, cache, model="m", client=None, **chat):
    return Chat(JudgeClient(url, model, **({"max_retries": 3, "backoff_s": 0.01} | (client or {}))), cache, **chat)


def judge_at(url, cache, rules="paper", repeats=1, **chat):
    return Judge(chat_at(url, cache, **chat), rules, repeats)


def question(text="q"):
    return Question(text, (BLACK, GREY), 2, 0, 10)


def case(kind="add", text="add a {braced} INSTRUCTION"):
    return Case("k", text, BLACK, kind)


def test_paper_scores_and_what_is_asked(tmp_path):
    with Server(lambda question, number: scores(6, 3)) as server:
        found = judge_at(server.url, tmp_path)(case(), BLACK, GREY)
    assert found == {"success": 6, "overedit": 3, "balance": pytest.approx(4)}
    path, question = server.questions[0]
    assert path == "/v1/chat/completions" and question["model"] == "m" and question["temperature"] == 0
    text, *pictures = question["messages"][0]["content"]
    assert "add a {braced} INSTRUCTION" in text["text"] and "success is 0" in text["text"]
    assert '{"score": [success, restraint]' in text["text"]
    shown = [base64.b64decode(p["image_url"]["url"].partition(",")[2]) for p in pictures]
    assert [int(np.asarray(Image.open(io.BytesIO(data))).mean()) for data in shown] == [0, 128]


def test_balance_is_zero_with_a_zero(tmp_path):
    with Server(lambda question, number: scores(0, 10)) as server:
        assert judge_at(server.url, tmp_path)(case(), BLACK, GREY)["balance"] == 0


def test_viescore_takes_the_smaller_and_the_root(tmp_path):
    def reply(question, number):
        return scores(9, 4) if len(question["messages"][0]["content"]) == 3 else scores(5, 9)

    with Server(reply) as server:
        found = judge_at(server.url, tmp_path, "viescore")(case(), BLACK, GREY)
    assert found == {"consistency": 4, "quality": 5, "overall": pytest.approx(np.sqrt(20))}
    assert all("success is 0" not in question["messages"][0]["content"][0]["text"] for _, question in server.questions)


def test_imgedit_holds_the_others_down(tmp_path):
    with Server(lambda question, number: scores(3, 5, 2)) as server:
        found = judge_at(server.url, tmp_path, "imgedit")(case("remove"), BLACK, GREY)
        with pytest.raises(ValueError, match="no rubric for edits of type 'dance'"):
            judge_at(server.url, tmp_path, "imgedit")(case("dance"), BLACK, GREY)
    assert found == {"adherence": 3, "quality": 3, "preservation": 2, "mean": pytest.approx(8 / 3)}
    text = server.questions[0][1]["messages"][0]["content"][0]["text"]
    assert all(words in text for words in RUBRICS["remove"]) and "CAP" not in text


def test_answers_are_cached_by_everything_that_matters(tmp_path):
    with Server(lambda question, number: scores(number, 5)) as server:
        first = judge_at(server.url, tmp_path)(case(), BLACK, GREY)
        assert judge_at(server.url, tmp_path)(case(), BLACK, GREY) == first and len(server.questions) == 1
        for other in (
            lambda: judge_at(server.url, tmp_path)(case(), BLACK, BLACK),
            lambda: judge_at(server.url, tmp_path)(case(text="other"), BLACK, GREY),
            lambda: judge_at(server.url, tmp_path, model="m2")(case(), BLACK, GREY),
            lambda: judge_at(server.url, tmp_path, client={"temperature": 1.0})(case(), BLACK, GREY),
            lambda: judge_at(server.url, tmp_path, repeats=2)(case(), BLACK, GREY),  # the first from the cache
        ):
            assert other() != first
        assert len(server.questions) == 6


def test_a_damaged_cache_is_asked_again(tmp_path):
    with Server(lambda question, number: scores(number, 5)) as server:
        judge_at(server.url, tmp_path)(case(), BLACK, GREY)
        (path,) = tmp_path.glob("*.json")
        path.write_text("{cut")
        assert judge_at(server.url, tmp_path)(case(), BLACK, GREY)["success"] == 2
        assert judge_at(server.url, tmp_path)(case(), BLACK, GREY)["success"] == 2 and len(server.questions) == 2


def test_limits_failures_and_nonsense_are_tried_again(tmp_path):
    replies = [
        (429, {"Retry-After": "0.01"}, "slow down"), (503, {}, ""), "I think it is good: 9/10", scores(11, 2),
        scores(7, 8),
    ]  # fmt: skip
    with Server(lambda question, number: replies[number - 1]) as server:
        judge = judge_at(server.url, tmp_path)
        assert judge(case(), BLACK, GREY)["success"] == 7
    told = [message["content"] for message in server.questions[-1][1]["messages"][1:]]
    assert told[0] == scores(11, 2) and "leaves 0 to 10" in told[1]
    assert judge.chat.num_repeated == 2 and judge.chat.client.num_tokens == [3000, 60]
    assert "5 requests" in judge.chat.account() and "currency" not in judge.chat.account()
    judge.chat.budget = Budget((2.5, 10.0))
    assert "0.01 in the currency" in judge.chat.account()


def test_endless_nonsense_is_named_and_not_cached(tmp_path):
    with Server(lambda question, number: "perfect!") as server:
        judge = judge_at(server.url, tmp_path, tries=2)
        for _ in range(2):  # the second time without asking again
            with pytest.raises(ValueError, match="not judged: no usable answer in 2 tries.*'perfect!'"):
                judge(case(), BLACK, GREY)
        assert len(server.questions) == 2 and not list(tmp_path.glob("*.json"))


def test_refusals_and_silence_are_told_apart(tmp_path):
    answers = {"key": (401, {}, "bad key"), "model": (404, {}, "no model"), "picture": (400, {}, "not this picture")}
    with Server(lambda question, number: answers[question["messages"][0]["content"][0]["text"]]) as server:
        for name, kind in (("key", JudgeAccessError), ("model", JudgeAccessError), ("picture", JudgeError)):
            with pytest.raises(JudgeError, match=f"HTTP {answers[name][0]}") as raised:
                chat_at(server.url, tmp_path).ask(question(name))
            assert raised.type is kind
        assert len(server.questions) == 3  # none of them again
    with pytest.raises(JudgeSilentError, match="no answer in 4 tries"):
        chat_at("http://127.0.0.1:9/v1", tmp_path).ask(question())


def test_a_judge_that_hangs_up_is_tried_again(tmp_path):
    with Server(lambda question, number: None if number <= 2 else scores(4, 4)) as server:
        assert judge_at(server.url, tmp_path, client={"max_retries": 2})(case(), BLACK, GREY)["success"] == 4
        assert len(server.questions) == 3


def test_a_judge_that_hangs_is_tried_again_and_named(tmp_path):
    free = threading.Event()
    with Server(lambda question, number: free.wait(60) and None) as server:
        judge = judge_at(server.url, tmp_path, client={"timeout_s": 0.1, "max_retries": 1})
        with pytest.raises(ValueError, match="not judged: .*no answer in 2 tries .*timed out"):
            judge(case(), BLACK, GREY)
        free.set()
    assert judge.chat.client.num_calls == 2


def some(count, folder):
    """A benchmark of one's own with its results in place."""
    cases = tuple(Case(f"k{i}", f"edit {i}", np.full((64, 64, 3), i, np.uint8), "add") for i in range(count))
    benchmark = Benchmark("own", cases, ())
    generate(benchmark, make_editor("identity"), folder)
    return benchmark


def test_a_judge_that_went_away_is_not_asked_for_every_case(tmp_path):
    benchmark = some(MAX_SILENT + 4, tmp_path)
    with Server(lambda question, number: (503, {}, "") if number > 2 else scores(5, 5)) as server:
        judge = judge_at(server.url, tmp_path / "judge", client={"max_retries": 0})
        judge.prepare(benchmark, tmp_path)
        assert len(server.questions) == 2 + MAX_SILENT
    reasons = [one["reason"] for one in score(benchmark, tmp_path, [], Backbones(), judge)["cases"]["failed"]]
    assert len(reasons) == MAX_SILENT + 2 and f"did not answer {MAX_SILENT} times in a row" in reasons[-1]
    with Server(lambda question, number: scores(5, 5)) as server:  # back again: only what is missing is asked
        judge = judge_at(server.url, tmp_path / "judge")
        judge.prepare(benchmark, tmp_path, workers=3)
        assert len(server.questions) == MAX_SILENT + 2
        assert score(benchmark, tmp_path, [], Backbones(), judge)["cases"]["failed"] == []


def test_a_judge_that_never_answered_is_not_waited_for(tmp_path):
    """A mistyped port: one case's tries, not eight."""
    benchmark = some(4, tmp_path)
    with Server(lambda question, number: (503, {}, "")) as server:
        judge = judge_at(server.url, tmp_path / "judge", client={"max_retries": 1})
        steps = []
        judge.prepare(benchmark, tmp_path, on_case=steps.append)
        assert len(server.questions) == 2 and steps == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="no case of .* could be scored: not judged: .*no answer in 2 tries"):
        score(benchmark, tmp_path, [], Backbones(), judge)


def test_answers_that_are_known_are_kept_while_the_judge_is_away(tmp_path):
    """Also those after a case that has none, and they do not count as a sign of life."""
    benchmark = some(6, tmp_path)
    with Server(lambda question, number: scores(5, 5)) as server:
        for known in benchmark.cases[2:]:
            judge_at(server.url, tmp_path / "judge")(known, known.source, known.source)
    with Server(lambda question, number: (503, {}, "")) as server:
        judge = judge_at(server.url, tmp_path / "judge", client={"max_retries": 0})
        judge.prepare(benchmark, tmp_path)
        found = score(benchmark, tmp_path, [], Backbones(), judge)
        assert len(server.questions) == 1
    assert [row["key"] for row in found["rows"]] == ["k2", "k3", "k4", "k5"]
    assert [one["key"] for one in found["cases"]["failed"]] == ["k0", "k1"]


def test_a_wrong_key_ends_the_run_at_once(tmp_path):
    benchmark = some(30, tmp_path)
    with Server(lambda question, number: (401, {}, "bad key")) as server:
        with pytest.raises(JudgeAccessError, match="set a valid key"):
            judge_at(server.url, tmp_path / "judge").prepare(benchmark, tmp_path, workers=2)
        assert len(server.questions) < 10


def test_repeats_are_averaged_and_their_agreement_told(tmp_path):
    """The same question each time, at the temperature asked for; no answer stands for another."""
    answers = [scores(8, 8), scores(6, 8), scores(7, 8)]
    with Server(lambda question, number: answers[number - 1]) as server:
        judge = judge_at(server.url, tmp_path, repeats=3, client={"temperature": 0.7})
        assert judge(case(), BLACK, GREY)["success"] == 7
        assert len(server.questions) == 3 and len(list(tmp_path.glob("*.json"))) == 3
        assert all(asked == server.questions[0] for asked in server.questions)
        assert server.questions[0][1]["temperature"] == 0.7
        again = judge_at(server.url, tmp_path, repeats=3, client={"temperature": 0.7})
        assert again(case(), BLACK, GREY)["success"] == 7 and len(server.questions) == 3
    agreement = judge.agreement()
    assert agreement == again.agreement()
    assert agreement["success"] == {
        "within_one": pytest.approx(2 / 3, abs=1e-6), "mean_distance": pytest.approx(4 / 3, abs=1e-6), "pairs": 3,
    }  # fmt: skip
    assert agreement["overedit"]["within_one"] == 1


def test_agreement_stands_on_the_report(tmp_path):
    benchmark = some(3, tmp_path / "run")
    with Server(lambda question, number: scores(number % 2 * 5, 5)) as server:
        judge = judge_at(server.url, tmp_path / "judge", repeats=2)
        score(benchmark, tmp_path / "run", [], Backbones(), judge)
    write_report(load_runs([tmp_path / "run"]), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<td>success</td><td>0%</td><td>5.00</td><td class=quiet>3</td>" in page
    assert "judged by m (paper rules)" in page and "judge balance" in page


def test_all_that_shapes_a_judgement_is_part_of_the_protocol(tmp_path):
    def settings(rules="paper", repeats=1, model="m", **client):
        return judge_at("http://x/v1", tmp_path, rules, repeats, model=model, client=client).settings

    found = [settings(), settings("viescore"), settings(repeats=2), settings(model="n"), settings(temperature=0.5)]
    assert len({json.dumps(one, sort_keys=True) for one in found}) == 5
    with pytest.raises(ValueError, match="judge temperature is 3: use 0 to 2"):
        settings(temperature=3)


@pytest.mark.parametrize(
    ("height", "width", "tokens"),
    [(512, 512, 361), (1024, 1024, 1369), (64, 64, 255), (2048, 512, 1406)],  # 28-pixel patches, or tiles: the larger
)
def test_tokens_of_a_picture(height, width, tokens):
    assert estimate_tokens(0, [(height, width)]) == tokens
    assert estimate_tokens(401, [(height, width)] * 2) == 101 + 2 * tokens


def test_cost_is_told_before_the_first_question(tmp_path):
    """Two cases of 64 x 64: two pictures of 255 tokens each, the prompt, and 80 tokens of answer."""
    benchmark = some(2, tmp_path)
    with Server(lambda question, number: scores(5, 5)) as server:
        judge = judge_at(server.url, tmp_path / "judge", budget=Budget((1000.0, 2000.0)))
        told = judge.estimate(benchmark, tmp_path)
        assert not server.questions
        prompts = [len(judge.rules.questions(case, BLACK, BLACK)[0].prompt) for case in benchmark.cases]
        tokens = sum(-(-length // 4) + 2 * 255 for length in prompts)
        assert f"2 questions to ask (0 answered already), about {tokens:,} prompt and 160 answer tokens" in told
        assert f"about {(tokens * 1000 + 160 * 2000) / 1e6:.2f} in the currency" in told
        judge(benchmark.cases[0], *(benchmark.cases[0].source,) * 2)
        assert "1 questions to ask (1 answered already)" in judge.estimate(benchmark, tmp_path)


def test_a_limit_refuses_before_and_stops_in_between(tmp_path):
    benchmark = some(6, tmp_path)
    with Server(lambda question, number: scores(5, 5)) as server:
        with pytest.raises(ValueError, match=r"6 questions .* more than the limit of 0.001; raise it"):
            judge_at(server.url, tmp_path, budget=Budget((1.0, 1.0), 0.001)).estimate(benchmark, tmp_path)
        assert not server.questions
        chat = chat_at(server.url, tmp_path / "judge", budget=Budget((1.0, 1.0), 0.003))  # 1,020 tokens an answer
        for number in range(3):
            chat.ask(question(f"q{number}"))
        with pytest.raises(NoAnswer, match="limit of 0.003 is spent"):
            chat.ask(question("q3"))
        assert chat.ask(question("q0")) == [5, 5] and len(server.questions) == 3  # what is known is free


def test_every_score_of_every_rule_is_explained():
    names = {name for rules, answers in (("paper", [[6, 3]]), ("viescore", [[9, 4], [5, 9]]), ("imgedit", [[3, 5, 2]]))
             for name in RULES[rules].scores(answers)}  # fmt: skip
    assert names == set(ABOUT)
    for rules, answers in (("paper", [[6, 3]]), ("viescore", [[9, 4], [5, 9]]), ("imgedit", [[3, 5, 2]])):
        main = next(iter(RULES[rules].scores(answers)))
        assert main == min(RULES[rules].scores(answers), key=list(ABOUT).index)


def test_rules_belong_to_the_benchmark(tmp_path):
    chosen = {name: default_rules(name) for name in ("gedit", "imgedit", "emu-edit", "pie-bench")}
    assert chosen == {"gedit": "viescore", "imgedit": "imgedit", "emu-edit": "paper", "pie-bench": "paper"}
    with pytest.raises(ValueError, match="use paper, viescore, imgedit"):
        judge_at("http://x/v1", tmp_path, "mine")
    with pytest.raises(ValueError, match="judge repeats is 0"):
        judge_at("http://x/v1", tmp_path, repeats=0)


@pytest.mark.parametrize(
    "text", ["", "9, 8", '{"score": [9]}', '{"score": [9, "8"]}', '{"score": [9, true]}', '{"score": [-1, 5]}',
             '{"note": 1}', "[9, 8]", '{"score": [9, 8', '{"a":' * 5000, '{"score": [NaN, 8]}'],
)  # fmt: skip
def test_no_score_is_guessed(text):
    with pytest.raises(ValueError, match="score|JSON"):
        parse_scores(text, 2, 0, 10)


def test_scores_may_stand_in_a_code_block():
    assert parse_scores('```json\n{"score": [9, 7.5], "reason": "a } b"}\n```', 2, 0, 10) == [9, 7.5]


def test_the_command_with_a_judge(tmp_path, capsys):
    """ImgEdit-Bench by the command: one case without an answer is named, the rest averaged; the second run is free."""
    from varedit.cli import main

    rows = {}
    for number, kind in enumerate(("add", "remove", "remove")):
        Image.new("RGB", (20, 10), (number, 0, 0)).save(tmp_path / f"{number}.png")
        rows[f"case{number}"] = {"id": f"{number}.png", "prompt": f"do {number}", "edit_type": kind}
    (tmp_path / "basic_edit.json").write_text(json.dumps(rows))

    def reply(question, number):
        text = question["messages"][0]["content"][0]["text"]
        return "no idea" if "do 2" in text else scores(5, 5, 2) if "do 1" in text else scores(4, 4, 4)

    def run():
        with pytest.raises(SystemExit) as ended:
            main(["evaluate", "run", "--benchmark", "imgedit", "--data", str(tmp_path), "--editor", "identity",
                  "--judge-url", server.url, "--judge-model", "m", "--workers", "3", "--judge-prices", "1,1",
                  "-o", str(tmp_path / "out")])  # fmt: skip
        assert ended.value.code == 0
        return capsys.readouterr()

    with Server(reply) as server:
        out = run()
        asked = len(server.questions)
        first = (tmp_path / "out/scores.json").read_bytes()
        again = run()
        assert len(server.questions) - asked == 3  # only the one without an answer
    assert "2 of 3 cases scored" in out.out and "case2: not judged" in out.out
    assert "judge: 3 questions to ask (0 answered already)" in out.err and "1 questions to ask (2" in again.err
    assert out.err.index("questions to ask") < out.err.index("requests")
    assert (tmp_path / "out/scores.json").read_bytes() == first
    found = json.loads(first)
    assert found["overall"]["judge_mean"]["mean"] == 4 and found["types"]["remove"]["judge_mean"]["n"] == 1
    assert found["protocol"]["judge"]["rules"] == "imgedit" and found["protocol"]["judge"]["model"] == "m"
