"""Editors: ours, diffusers pipelines, an endpoint, a command, a folder."""

import base64
import email.parser
import email.policy
import io
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from varedit.evaluation.cases import Case
from varedit.evaluation.editors import EditFailed, make_editor

SOURCE = Image.new("RGB", (48, 32), (10, 20, 30))
CASE = Case("k1", 'make "it" red; {seed} $HOME', np.asarray(SOURCE), extra={"file": "7/k1.png"})


class Endpoint:
    """An OpenAI-style image endpoint: inverts the picture, and keeps the form fields it was sent."""

    def __init__(self, answer=None):
        self.forms = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
                message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + body)
                form = {part.get_param("name", header="content-disposition"): part.get_payload(decode=True)
                        for part in message.iter_parts()}  # fmt: skip
                outer.forms.append((self.path, form, self.headers.get("Authorization")))
                status, text = answer or (200, self.inverted(form["image"]))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def inverted(self, data):
                pixels = 255 - np.asarray(Image.open(io.BytesIO(data)))
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, "PNG")
                return json.dumps({"data": [{"b64_json": base64.b64encode(buffer.getvalue()).decode()}]})

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


def test_endpoint(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with Endpoint() as endpoint:
        editor = make_editor(f"openai:{endpoint.url}?model=gpt-image-1&quality=high")
        result = editor.edit(CASE, SOURCE, 5)
    assert np.asarray(result)[0, 0].tolist() == [245, 235, 225]
    path, form, key = endpoint.forms[0]
    assert path == "/v1/images/edits" and key == "Bearer secret"
    assert form["prompt"].decode() == CASE.instruction and form["model"] == b"gpt-image-1" and form["seed"] == b"5"
    assert form["quality"] == b"high" and "secret" not in json.dumps(editor.settings)


@pytest.mark.parametrize(
    ("answer", "message"),
    [((429, "too many"), "429: too many"), ((200, "{}"), "no picture"),
     ((200, '{"data":[{"b64_json":"AAAA"}]}'), "no picture"),
     ((200, '{"data":[{"url":"file:///etc/passwd"}]}'), "no picture"),
     ((200, '{"data":[{"url":"http://a picture/1"}]}'), "did not answer: InvalidURL")],
)  # fmt: skip
def test_endpoint_that_fails_is_named(answer, message):
    with Endpoint(answer) as endpoint, pytest.raises(EditFailed, match=message) as raised:
        make_editor(f"openai:{endpoint.url}").edit(CASE, SOURCE, 0)
    assert " at 0x" not in str(raised.value)


def test_command_gets_its_fields_and_no_shell(tmp_path):
    script = tmp_path / "edit.py"
    script.write_text(
        "import sys, json\nfrom PIL import Image, ImageOps\n"
        "ImageOps.invert(Image.open(sys.argv[1])).save(sys.argv[3])\n"
        "open(sys.argv[5], 'w').write(json.dumps([sys.argv[2], sys.argv[4]]))\n"
    )
    seen = tmp_path / "seen.json"
    template = f"{sys.executable} {script} {{source}} {{instruction}} {{output}} s={{seed}} {seen}"
    result = make_editor(f"command:{template}").edit(CASE, SOURCE, 7)
    assert np.asarray(result)[0, 0].tolist() == [245, 235, 225]
    assert json.loads(seen.read_text()) == [CASE.instruction, "s=7"]


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import sys; sys.exit('no memory')", "ended with 1: no memory"),
        ("import sys; sys.exit('cannot use ' + sys.argv[1])", "ended with 1: cannot use .../source.png"),
        ("pass", "left no picture"),
    ],
)
def test_command_that_fails_is_named(program, message):
    editor = make_editor(f'command:{sys.executable} -c "{program}" {{source}} {{instruction}} {{output}}')
    reasons = set()
    for _ in range(2):
        with pytest.raises(EditFailed, match=message) as raised:
            editor.edit(CASE, SOURCE, 0)
        reasons.add(str(raised.value))
    assert len(reasons) == 1  # they go into the score file, which has to repeat to the byte


def test_folder_of_results(tmp_path):
    (tmp_path / "7").mkdir()
    Image.new("RGB", (5, 5), (1, 2, 3)).save(tmp_path / "7/k1.png")
    assert make_editor(f"folder:{tmp_path}").edit(CASE, SOURCE, 0).size == (5, 5)
    Image.new("RGB", (6, 6)).save(tmp_path / "k1.webp")
    assert make_editor(f"folder:{tmp_path}").edit(CASE, SOURCE, 0).size == (6, 6)
    assert make_editor(f"folder:{tmp_path}/7/{{key}}.png").edit(CASE, SOURCE, 0).size == (5, 5)
    with pytest.raises(EditFailed, match="no result"):
        make_editor(f"folder:{tmp_path}/{{key}}_x.png").edit(CASE, SOURCE, 0)


def test_known_editors():
    assert make_editor("identity").edit(CASE, SOURCE, 0) is SOURCE
    with pytest.raises(EditFailed, match="known answers"):
        make_editor("oracle").edit(CASE, SOURCE, 0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [("photoshop", "is unknown"), ("identity:x", "is unknown"), ("diffusers:", "is unknown"),
     ("openai:localhost", "full address"), ("command:edit {source} {output}", "lacks {instruction}"),
     ("folder:/no/such/folder", "does not exist"), ("openai:http://x/v1?timeout=soon", "timeout is 'soon'"),
     ("openai:http://x/v1?timeout=0", "timeout is 0")],
)  # fmt: skip
def test_bad_specs_are_named(spec, message):
    with pytest.raises(ValueError, match=message):
        make_editor(spec)


def test_a_pipeline_that_is_not_there():
    with pytest.raises(ValueError, match="cannot load the pipeline"):
        make_editor("diffusers:no/such-pipeline", "cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from varedit.testing import tiny_pipeline

    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(folder)
    return folder


def asked(count):
    """Cases with sources and seeds of their own, of two sizes."""
    rng = np.random.default_rng(0)
    sources = [Image.fromarray(rng.integers(0, 256, (48 + 40 * (i % 2), 64, 3)).astype(np.uint8)) for i in range(count)]
    cases = [Case(f"k{i}", f"edit number {i}", np.asarray(source)) for i, source in enumerate(sources)]
    return cases, sources, list(range(count))


def test_our_pipeline_draws_what_a_call_of_it_draws(model):
    """Nothing is preserved unless asked for, and a batch gives the pictures of single edits."""
    cases, sources, seeds = asked(5)
    editor = make_editor(f"varedit:{model}?temperature=0.7&guidance_scale=2&top_p=0.9", "cpu")
    batch = editor.edit_all(cases, sources, seeds)
    for case, source, seed, image in zip(cases, sources, seeds, batch):
        single = editor.edit(case, source, seed)
        called = editor.pipeline(
            source, case.instruction, seed=seed, temperature=0.7, guidance_scale=2.0, top_p=0.9
        ).images[0]
        assert image.tobytes() == single.tobytes() == called.tobytes()


def test_options_of_our_pipeline(model):
    cases, sources, seeds = asked(1)
    drawn = {}
    for options in ("", "?guidance_scale=1", "?temperature=0", "?top_p=0.6", "?fit=square", "?preserve=exact"):
        editor = make_editor(f"varedit:{model}{options}", "cpu")
        drawn[options] = editor.edit_all(cases, sources, seeds)[0].tobytes()
    assert len(set(drawn.values())) == len(drawn)
    assert make_editor(f"varedit:{model}?preserve=blend&strength=0.5", "cpu").settings["strength"] == 0.5
    assert make_editor(f"varedit:{model}?dtype=bfloat16", "cpu").settings["dtype"] == "torch.bfloat16"


@pytest.mark.parametrize(
    ("options", "message"),
    [("colour=3", "option 'colour' of varedit is unknown; use .*guidance_scale"), ("preserve=no", "preserve 'no'"),
     ("temperature=-1", "temperature -1 must be 0 or more"), ("guidance_scale=high", "guidance_scale"),
     ("dtype=float16", "dtype 'float16' is unknown"), ("size=100", "size")],
)  # fmt: skip
def test_bad_options_of_our_pipeline_are_named_before_it_loads(options, message):
    with pytest.raises(ValueError, match=message):
        make_editor(f"varedit:/no/such/model?{options}")


def test_the_default_model_takes_options_without_a_colon():
    with pytest.raises(ValueError, match="option 'colour' of varedit"):
        make_editor("varedit?colour=3")
