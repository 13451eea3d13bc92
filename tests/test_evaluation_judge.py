"""The judge against a real HTTP server in this process."""

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from varedit.data.judge_client import JudgeClient, JudgeError
from varedit.evaluation.cases import Case
from varedit.evaluation.chat import Chat
from varedit.evaluation.judge import RUBRICS, Judge, make_judge, parse_scores

BLACK, GREY = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 128, np.uint8)


class Server:
    """Answers chat completions with what `reply(question, number)` gives: a text, or (status, headers, body)."""

    def __init__(self, reply):
        self.questions = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.questions.append((self.path, question))
                answer = reply(question, len(outer.questions))
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


def chat_at(url, cache, model="m", **chat):
    return Chat(JudgeClient(url, model, max_retries=3, backoff_s=0.01), cache, **chat)


def judge_at(url, cache, rules="paper", repeats=1, **chat):
    return Judge(chat_at(url, cache, **chat), rules, repeats)


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
        ):
            assert other() != first
        next(tmp_path.glob("*.json")).write_text("{cut")
        for _ in range(2):
            judge_at(server.url, tmp_path)(case(), BLACK, BLACK)
    assert len(server.questions) <= 5


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
    assert "5 requests" in judge.chat.account() and "0.01 in the currency" in judge.chat.account((2.5, 10.0))


def test_endless_nonsense_is_named_and_not_cached(tmp_path):
    with Server(lambda question, number: "perfect!") as server:
        judge = judge_at(server.url, tmp_path, tries=2)
        for _ in range(2):  # the second time without asking again
            with pytest.raises(ValueError, match="not judged: no usable answer in 2 tries.*'perfect!'"):
                judge(case(), BLACK, GREY)
        assert len(server.questions) == 2 and not list(tmp_path.glob("*.json"))


def test_a_refusal_and_a_server_that_is_not_there_are_named(tmp_path):
    with Server(lambda question, number: (401, {}, "bad key")) as server:
        with pytest.raises(JudgeError, match="HTTP 401 bad key"):
            chat_at(server.url, tmp_path).ask("q", [], str)
        assert len(server.questions) == 1
    with pytest.raises(ValueError, match="not judged: .*no answer in 4 tries"):
        judge_at("http://127.0.0.1:9/v1", tmp_path)(case(), BLACK, GREY)


def test_repeats_are_averaged_and_their_agreement_told(tmp_path):
    def reply(question, number):
        text = question["messages"][0]["content"][0]["text"]
        return scores(7, 8) if "judgement 3" in text else scores(6, 8) if "judgement 2" in text else scores(8, 8)

    with Server(reply) as server:
        judge = make_judge("emu-edit", server.url, "m", tmp_path, repeats=3)
        assert judge(case(), BLACK, GREY)["success"] == 7
        assert len(server.questions) == 3
    agreement = judge.agreement()
    assert agreement["success"] == {
        "within_one": pytest.approx(2 / 3),
        "mean_distance": pytest.approx(4 / 3),
        "pairs": 3,
    }
    assert agreement["overedit"]["within_one"] == 1


def test_rules_belong_to_the_benchmark(tmp_path):
    chosen = {name: make_judge(name, "http://x/v1", "m", tmp_path).settings["rules"] for name in
              ("gedit", "imgedit", "emu-edit", "pie-bench")}  # fmt: skip
    assert chosen == {"gedit": "viescore", "imgedit": "imgedit", "emu-edit": "paper", "pie-bench": "paper"}
    with pytest.raises(ValueError, match="use paper, viescore, imgedit"):
        make_judge("gedit", "http://x/v1", "m", tmp_path, rules="mine")


@pytest.mark.parametrize(
    "text", ["", "9, 8", '{"score": [9]}', '{"score": [9, "8"]}', '{"score": [9, true]}', '{"score": [-1, 5]}',
             '{"note": 1}', "[9, 8]", '{"score": [9, 8'],
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
    assert "2 of 3 cases scored" in out.out and "case2: not judged" in out.out and "currency" in again.err
    assert (tmp_path / "out/scores.json").read_bytes() == first
    found = json.loads(first)
    assert found["overall"]["judge_mean"]["mean"] == 4 and found["types"]["remove"]["judge_mean"]["n"] == 1
    assert found["protocol"]["judge"]["rules"] == "imgedit" and found["protocol"]["judge"]["model"] == "m"
