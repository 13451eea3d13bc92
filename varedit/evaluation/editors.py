"""Who is evaluated: our pipeline, any diffusers pipeline, an endpoint, a command, a folder of finished results.

An editor is named by a SPEC:

    varedit[:MODEL]   our pipeline; MODEL is a folder or hub name, by default the model in the package
    identity          returns the source: the floor of every score
    oracle            returns the known answer: the ceiling
    diffusers:ID      a diffusers pipeline by folder or hub name
    openai:URL        an OpenAI-style endpoint, POST URL/images/edits
    command:TEMPLATE  a command line with {source}, {instruction}, {output}, {seed}
    folder:DIR        finished results DIR/KEY.png (or a path with {key})

Options follow a question mark, as in an address: `varedit?temperature=0&preserve=exact`,
`diffusers:timbrooks/instruct-pix2pix?guidance_scale=7.5&image_guidance_scale=1.5`.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import json
import os
import re
import shlex
import subprocess
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, Protocol

from PIL import Image

from varedit.evaluation.cases import Case, read_picture

SPECS = "varedit[:MODEL], identity, oracle, diffusers:ID, openai:URL, command:TEMPLATE or folder:DIR"


class EditFailed(RuntimeError):
    """An editor gave no picture for a case: noted in the manifest, tried again by the next run."""


class Editor(Protocol):
    """What generation needs to know of an editor.

    Attributes:
        settings: all that shapes its results, as plain JSON values; a run is resumed only with equal settings.
        concurrent: True if several cases may be edited at once from threads.
        batched: True if several cases in one call are faster than one by one.
        place: where its memory is held: in this process, in programs that it starts, or elsewhere.
    """

    settings: dict[str, Any]
    concurrent: bool = False
    batched: bool = False
    place: Literal["process", "children", "elsewhere"] = "process"

    def edit(self, case: Case, source: Image.Image, seed: int) -> Image.Image:
        """The edited picture, RGB of any size.

        Raises:
            EditFailed: no picture; the message says why.
        """
        ...

    def edit_all(
        self, cases: Sequence[Case], sources: Sequence[Image.Image], seeds: Sequence[int]
    ) -> list[Image.Image]:
        """Several cases in one call; the pictures are those that `edit` gives for each."""
        return [self.edit(*one) for one in zip(cases, sources, seeds)]


def make_editor(spec: str, device: str | None = None) -> Editor:
    """The editor of a SPEC (see the top of this module). Models load at the first edit.

    Raises:
        ValueError: an unknown or incomplete SPEC.
    """
    kind, _, rest = spec.partition(":")
    if kind.partition("?")[0] == "varedit":  # the default model needs no colon before its options
        rest = rest or kind.removeprefix("varedit")
        name, options = parse_options(rest)
        return VAREditEditor(name or None, options, device)
    if kind == "command":
        return CommandEditor(rest)
    if kind in ("identity", "oracle") and not rest:
        return _KnownEditor(kind)
    makers: dict[str, Callable[[], Editor]] = {
        "diffusers": lambda: _diffusers(rest, device),
        "openai": lambda: OpenAIEditor(*parse_options(rest)),
        "folder": lambda: FolderEditor(rest),
    }
    if kind not in makers or not rest:
        raise ValueError(f"editor {spec!r} is unknown; use {SPECS}")
    return makers[kind]()


def _diffusers(rest: str, device: str | None) -> Editor:
    from varedit.evaluation.diffusers_editor import DiffusersEditor

    return DiffusersEditor(*parse_options(rest), device)


def parse_options(text: str) -> tuple[str, dict[str, Any]]:
    """NAME?a=1&b=x -> the name and its options; numbers and true/false become such."""
    name, _, query = text.partition("?")
    options: dict[str, Any] = {}
    for key, value in urllib.parse.parse_qsl(query, keep_blank_values=True):
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return name, options


class _KnownEditor(Editor):
    """The source (identity) or the known answer (oracle)."""

    concurrent = True

    def __init__(self, kind: str) -> None:
        self.settings = {"editor": kind}

    def edit(self, case: Case, source: Image.Image, seed: int) -> Image.Image:
        if self.settings["editor"] == "identity":
            return source
        if case.target is None:
            raise EditFailed("oracle needs a benchmark with known answers, such as procedural")
        return Image.fromarray(read_picture(case.target))


class VAREditEditor(Editor):
    """Our pipeline. Settings hold the model's own defaults and a hash of the model once it is loaded.

    Options: the `dtype`, and those of `editing.edit.Settings`: of the pipeline's call (`guidance_scale`, `temperature`,
    `top_p`, `size`, `fit`), and what becomes of the pixels that the edit did not change (`preserve`, `strength`, ...).
    Nothing is preserved unless asked for, so that scores outside the mask are those of what the model draws.
    """

    batched = True

    def __init__(self, model: str | None, options: dict[str, Any], device: str | None) -> None:
        import torch

        from varedit.editing.edit import Settings
        from varedit.pipeline import load_pipeline

        known = {"dtype", *(item.name for item in fields(Settings))} - {"calibration"}
        for option in options:
            if option not in known:
                raise ValueError(f"option {option!r} of varedit is unknown; use {', '.join(sorted(known))}")
        chosen = {"preserve": "off", "lock": "off", "crop": "off", **options}
        dtype = chosen.pop("dtype", None)
        if dtype not in (None, "float32", "bfloat16"):
            raise ValueError(f"dtype {dtype!r} is unknown; use float32 or bfloat16")
        wanted = Settings.from_json(chosen)
        self.pipeline = load_pipeline(model, device, getattr(torch, dtype) if dtype else None)
        self.pipeline.set_progress_bar_config(disable=True)
        self.edit_settings = wanted.resolved(self.pipeline)
        digest, precision = _model_digest(self.pipeline), str(self.pipeline.dtype)
        self.settings = {"editor": "varedit", "model": digest, "dtype": precision, **self.edit_settings.to_json()}

    def edit(self, case: Case, source: Image.Image, seed: int) -> Image.Image:
        return self.edit_all([case], [source], [seed])[0]

    def edit_all(
        self, cases: Sequence[Case], sources: Sequence[Image.Image], seeds: Sequence[int]
    ) -> list[Image.Image]:
        from varedit.editing.edit import EditRequest, apply_edits

        requests = [
            EditRequest(source, case.instruction, seed)
            for case, source, seed in zip(cases, sources, seeds, strict=True)
        ]
        return [result.image for result in apply_edits(self.pipeline, requests, self.edit_settings)]


def _model_digest(pipeline: Any) -> str:
    """Hash over weights and configuration: the layout of positions, say, is in no weight."""
    from varedit.editing.model_identity import state_configs, state_sha256

    known = [state_sha256(pipeline), state_configs(pipeline)]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]


class OpenAIEditor(Editor):
    """POST URL/images/edits with a file and a prompt, as OpenAI's API has it. The key comes from OPENAI_API_KEY.

    Options: `model`, `timeout` (seconds), all others are sent as form fields (size, quality, n is always 1).
    """

    concurrent = True
    place = "elsewhere"

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"openai:{url} needs a full address, such as openai:http://localhost:8000/v1")
        self.url = url.rstrip("/")
        self.settings = {"editor": "openai", "url": self.url, **options}
        self.timeout = options.pop("timeout", 300)
        if type(self.timeout) not in (int, float) or not 0 < self.timeout < 1e6:
            raise ValueError(f"timeout is {self.timeout!r}: use a number of seconds above 0")
        self.fields = {key: str(value) for key, value in options.items()}

    def edit(self, case: Case, source: Image.Image, seed: int) -> Image.Image:
        fields = {**self.fields, "prompt": case.instruction, "n": "1", "seed": str(seed)}
        if self.url.startswith("https://api.openai.com"):
            del fields["seed"]  # not a field there
        body, kind = _multipart(fields, _png(source))
        request = urllib.request.Request(f"{self.url}/images/edits", body, {"Content-Type": kind})
        if key := os.environ.get("OPENAI_API_KEY"):
            request.add_header("Authorization", f"Bearer {key}")
        answer = self._open(request)
        try:
            first = json.loads(answer)["data"][0]
            data = base64.b64decode(first["b64_json"]) if first.get("b64_json") else self._fetch(first["url"])
            return Image.open(io.BytesIO(data)).convert("RGB")
        except (ValueError, KeyError, IndexError, TypeError, OSError) as error:
            # Pillow's own words hold an address in memory, and score files have to repeat.
            reason = type(error).__name__ if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
            raise EditFailed(f"the endpoint's answer is no picture ({reason})") from error

    def _fetch(self, url: str) -> bytes:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"picture address {url[:60]!r}")
        return self._open(urllib.request.Request(url))

    def _open(self, request: urllib.request.Request) -> bytes:
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            raise EditFailed(f"the endpoint answered {error.code}: {_beginning(error)}") from error
        except (OSError, http.client.HTTPException) as error:  # refused, timed out, reset, cut off
            raise EditFailed(f"the endpoint did not answer: {type(error).__name__}: {error}") from error


def _beginning(answer: urllib.error.HTTPError) -> str:
    try:
        return answer.read(300).decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        return f"({type(error).__name__})"


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _multipart(fields: dict[str, str], png: bytes) -> tuple[bytes, str]:
    """A form with one picture: the body and its content type."""
    boundary = uuid.uuid4().hex
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
    ]
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="image.png"\r\n'
    parts.append(f"{head}Content-Type: image/png\r\n\r\n".encode() + png + b"\r\n")
    parts.append(f"--{boundary}--\r\n".encode())
    return b"".join(parts), f"multipart/form-data; boundary={boundary}"


class CommandEditor(Editor):
    """Runs a command once a case: for editors that live in repositories of their own.

    The template is split as a shell would, but no shell runs: instructions cannot inject commands.
    """

    concurrent = True
    place = "children"
    TIMEOUT = 1800

    def __init__(self, template: str) -> None:
        self.settings = {"editor": "command", "template": template}
        try:
            self.words = shlex.split(template)
        except ValueError as error:
            raise ValueError(f"command {template!r} cannot be split: {error}") from error
        for field in ("{source}", "{instruction}", "{output}"):
            if field not in template:
                raise ValueError(
                    f"command {template!r} lacks {field}; it needs {{source}}, {{instruction}}, {{output}}"
                )

    def edit(self, case: Case, source: Image.Image, seed: int) -> Image.Image:
        with tempfile.TemporaryDirectory() as folder:
            try:
                return self._run(case, source, seed, Path(folder))
            except EditFailed as error:  # the folder has another name every time, and score files have to repeat
                raise EditFailed(str(error).replace(folder, "...")) from error

    def _run(self, case: Case, source: Image.Image, seed: int, folder: Path) -> Image.Image:
        values = {
            "{source}": str(folder / "source.png"),
            "{output}": str(folder / "output.png"),
            "{instruction}": case.instruction,
            "{seed}": str(seed),
        }
        source.save(values["{source}"])
        words = [_fill(word, values) for word in self.words]
        try:
            done = subprocess.run(
                words, capture_output=True, encoding="utf-8", errors="replace", timeout=self.TIMEOUT, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise EditFailed(f"the command did not run: {error}") from error
        if done.returncode:
            last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
            raise EditFailed(f"the command ended with {done.returncode}: {last}")
        try:
            with Image.open(values["{output}"]) as image:
                return image.convert("RGB")
        except OSError as error:
            raise EditFailed(f"the command left no picture in {{output}}: {error}") from error


def _fill(word: str, values: dict[str, str]) -> str:
    """The fields of a word in one pass: an instruction that contains {seed} stays as it is."""
    return re.sub("|".join(map(re.escape, values)), lambda found: values[found.group()], word)


class FolderEditor(Editor):
    """Results made elsewhere: DIR/KEY.png, .jpg, .jpeg or .webp, or a path that contains {key}.

    Also found where a benchmark's own tools put them: MagicBrush DIR/ID/KEY.png, GEdit-Bench
    DIR/fullset/TYPE/LANGUAGE/KEY.png.
    """

    concurrent = True

    def __init__(self, folder: str) -> None:
        self.settings = {"editor": "folder", "folder": folder}
        suffixes = ("",) if "{key}" in folder else (".png", ".jpg", ".jpeg", ".webp")
        self.patterns = [(folder if "{key}" in folder else f"{folder}/{{key}}") + suffix for suffix in suffixes]
        if "{key}" not in folder and not Path(folder).is_dir():
            raise ValueError(f"folder {folder!r} does not exist; name the folder with the results")

    def edit(self, case: Case, source: Image.Image, seed: int) -> Image.Image:
        paths = [Path(pattern.replace("{key}", case.key)) for pattern in self.patterns]
        if "file" in case.extra and "{key}" not in self.settings["folder"]:
            paths.append(Path(self.settings["folder"], case.extra["file"]))
        for path in paths:
            if path.is_file():
                try:
                    return Image.fromarray(read_picture(path))
                except ValueError as error:
                    raise EditFailed(str(error)) from error
        raise EditFailed(f"no result {paths[0]}")
