"""Questions with pictures to any OpenAI-compatible model: validated, retried, cached on disk, counted."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import logging
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from varedit.evaluation.cases import picture_digest

logger = logging.getLogger(__name__)
Answer = TypeVar("Answer")

MAX_WAIT = 60.0
"""The longest pause in seconds before a question is asked again, whatever the server wants."""


class NoAnswer(ValueError):
    """A model gave no usable answer after all tries."""


class Chat:
    """A model behind POST URL/chat/completions. The key comes from OPENAI_API_KEY.

    Args:
        url: up to /v1. model: its name there.
        cache: folder of answers, keyed by model, settings, prompt and pictures; valid answers only.
        temperature: of sampling. max_tokens: of an answer.
        tries: how often a question is asked when the server fails, limits or answers nonsense.
        pause: seconds before the second try; doubled each time, and never less than the server asks for.
    """

    def __init__(
        self,
        url: str,
        model: str,
        cache: Path,
        *,
        temperature: float = 0.0,
        max_tokens: int = 400,
        tries: int = 5,
        pause: float = 2.0,
        timeout: float = 120.0,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"judge address {url!r} is no URL; use one such as http://localhost:8000/v1")
        self.url, self.model, self.cache = url.rstrip("/"), model, cache
        self.temperature, self.max_tokens = temperature, max_tokens
        self.tries, self.pause, self.timeout = tries, pause, timeout
        self.counts = {"asked": 0, "cached": 0, "repeated": 0, "prompt_tokens": 0, "completion_tokens": 0}
        self._lock = threading.Lock()

    def ask(
        self, prompt: str, pictures: Sequence[np.ndarray], parse: Callable[[str], Answer], repeat: int = 0
    ) -> Answer:
        """Ask once and give the parsed answer.

        Args:
            pictures: uint8 (H, W, 3), shown after the text in order.
            parse: turns the text into an answer, or raises ValueError: then the question is asked again.
            repeat: number of this judgement of the same question; each has its own cache entry.

        Raises:
            NoAnswer: every try failed; the message says how the last one did.
        """
        asked = [self.model, self.temperature, self.max_tokens, prompt, [picture_digest(p) for p in pictures], repeat]
        path = self.cache / f"{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]}.json"
        if path.is_file():
            try:
                answer = parse(json.loads(path.read_text(encoding="utf-8"))["text"])
                self._count(cached=1)
                return answer
            except (ValueError, KeyError):
                logger.warning("cached answer %s is damaged; asking again", path.name)
        body = self._body(prompt, pictures, repeat)
        reason = ""
        for attempt in range(self.tries):
            if attempt:
                self._count(repeated=1)
            try:
                text = self._post(body)
                answer = parse(text)
            except _Refused as error:
                raise NoAnswer(str(error)) from error
            except _Busy as error:
                reason = str(error)
                if attempt + 1 < self.tries:
                    self._wait(attempt, error.seconds)
            except ValueError as error:
                reason = f"unusable answer: {error}"
            else:
                self._keep(path, text)
                return answer
        raise NoAnswer(f"no answer after {self.tries} tries; the last: {reason}")

    def _body(self, prompt: str, pictures: Sequence[np.ndarray], repeat: int) -> bytes:
        content: list[dict[str, Any]] = [{"type": "text", "text": prompt}]
        content += [{"type": "image_url", "image_url": {"url": _data_url(picture)}} for picture in pictures]
        return json.dumps({
            "model": self.model, "temperature": self.temperature, "max_tokens": self.max_tokens, "seed": repeat,
            "messages": [{"role": "user", "content": content}],
        }).encode()  # fmt: skip

    def _post(self, body: bytes) -> str:
        request = urllib.request.Request(f"{self.url}/chat/completions", body, {"Content-Type": "application/json"})
        if key := os.environ.get("OPENAI_API_KEY"):
            request.add_header("Authorization", f"Bearer {key}")
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                data = response.read()
        except urllib.error.HTTPError as error:
            detail = f"the judge answered {error.code}: {error.read(200).decode(errors='replace')}"
            if error.code in (408, 409, 425, 429) or error.code >= 500:
                raise _Busy(detail, error.headers.get("Retry-After")) from error
            raise _Refused(detail) from error
        except OSError as error:  # refused, reset, timed out
            raise _Busy(f"the judge did not answer: {error}", None) from error
        try:
            answer = json.loads(data)
            text = answer["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ValueError(f"no chat completion ({type(error).__name__})") from error
        usage = answer.get("usage") or {}
        self._count(asked=1, **{name: int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")})
        if not isinstance(text, str):
            raise ValueError("an answer without text")
        return text

    def _wait(self, attempt: int, asked_for: float | None) -> None:
        seconds = self.pause * 2**attempt * random.uniform(0.8, 1.2)  # spread, so that threads do not return at once
        time.sleep(min(MAX_WAIT, max(seconds, asked_for or 0)))

    def _keep(self, path: Path, text: str) -> None:
        self.cache.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{threading.get_ident()}.tmp")
        temporary.write_text(json.dumps({"model": self.model, "text": text}, ensure_ascii=False), encoding="utf-8")
        os.replace(temporary, path)

    def _count(self, **more: int) -> None:
        with self._lock:
            for name, value in more.items():
                self.counts[name] += value

    def account(self, prices: tuple[float, float] | None = None) -> str:
        """What was asked so far, in words; `prices` are for a million prompt and completion tokens."""
        count = self.counts
        tokens = count["prompt_tokens"], count["completion_tokens"]
        text = f"judge: {count['asked']} answers, {count['cached']} from the cache, {count['repeated']} asked again; "
        text += f"{tokens[0]} + {tokens[1]} tokens"
        if prices is not None:
            text += f", {(tokens[0] * prices[0] + tokens[1] * prices[1]) / 1e6:.2f} in the currency of the prices"
        return text


class _Busy(Exception):
    """Worth another try, after `seconds` if the server says so."""

    def __init__(self, message: str, retry_after: str | None) -> None:
        super().__init__(message)
        self.seconds = float(retry_after) if retry_after and retry_after.replace(".", "", 1).isdigit() else None


class _Refused(Exception):
    """Not worth another try: a wrong key, an unknown model, a request the server does not take."""


def _data_url(picture: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
