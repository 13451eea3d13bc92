"""Asking a vision-language model behind any OpenAI-compatible chat endpoint, patiently."""

from __future__ import annotations

import base64
import http.client
import json
import logging
import math
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

logger = logging.getLogger(__name__)

ANSWER_TOKENS = 80
"""Of an answer, as a rule: some numbers or flags and a sentence."""

KEY_VARIABLES = ("VAREDIT_JUDGE_API_KEY", "OPENAI_API_KEY")
_PASSING = (408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529)


class JudgeError(ValueError):
    """The endpoint refuses, or did not answer after all tries. The message is one line, with the fix."""


class JudgeAccessError(JudgeError):
    """A wrong key, address or model: no other question would fare better."""


class JudgeSilentError(JudgeError):
    """No answer after all tries."""


@dataclass
class JudgeClient:
    """One endpoint and one model. Safe to use from several threads, which then wait together when told to slow down.

    Attributes:
        url: Base address such as `http://127.0.0.1:8000/v1`, or the full one of `/chat/completions`.
        model: Name the endpoint knows.
        temperature: Of the answers; 0 takes the likeliest words.
        max_tokens: Of an answer.
        timeout_s: For one try.
        max_retries: Tries after the first, for rate limits, server errors and lost connections.
        backoff_s: Pause before the first retry; doubles each time, up to a minute, and varies at random.
        num_calls: Requests sent so far. num_tokens: Prompt and answer tokens, as the endpoint counts them.
    """

    url: str
    model: str
    temperature: float = 0.0
    max_tokens: int = 512
    timeout_s: float = 120.0
    max_retries: int = 6
    backoff_s: float = 1.0
    num_calls: int = 0
    num_tokens: list[int] = field(default_factory=lambda: [0, 0])

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"judge url {self.url!r} is no address: use one such as http://127.0.0.1:8000/v1")
        if not self.model:
            raise ValueError("judge model is empty: name a model that the endpoint serves")
        if not 0 <= self.temperature <= 2:
            raise ValueError(f"judge temperature is {self.temperature}: use 0 to 2")
        address = self.url.rstrip("/")
        self._address = address if address.endswith("/chat/completions") else address + "/chat/completions"
        self._key = _key()
        self._lock = threading.Lock()
        self._quiet_until = 0.0

    def ask(self, messages: list[dict[str, Any]]) -> str:
        """The model's answer as text.

        Args:
            messages: As the chat API takes them.

        Raises:
            JudgeAccessError: A wrong key, address or model.
            JudgeSilentError: No answer after all tries.
            JudgeError: This question is refused.
        """
        body = {
            "model": self.model, "messages": messages, "temperature": self.temperature, "max_tokens": self.max_tokens,
        }  # fmt: skip
        data = json.dumps(body).encode("utf-8")
        reason = ""
        for attempt in range(self.max_retries + 1):
            self._wait()
            try:
                return self._send(data)
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code} {_first_words(error)}"
                if error.code not in _PASSING:
                    kind = JudgeAccessError if error.code in (401, 403, 404) else JudgeError
                    raise kind(f"{self._address} refuses model {self.model!r}: {reason}; {_fix(error.code)}") from error
                pause = _retry_after(error.headers.get("Retry-After"))
            except (
                OSError,
                http.client.HTTPException,
                _BadReplyError,
            ) as error:  # timeouts and refused connections too
                reason, pause = f"{type(error).__name__}: {error}", None
            logger.info("%s: %s (try %d)", self._address, reason, attempt + 1)
            if attempt < self.max_retries:
                self._pause(attempt, pause)
        raise JudgeSilentError(
            f"{self._address} gave no answer in {self.max_retries + 1} tries ({reason}); start it, or try again later"
        )

    def _send(self, data: bytes) -> str:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self._address, data, headers, method="POST")
        with self._lock:
            self.num_calls += 1
        with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
            raw = response.read()
        try:
            reply = json.loads(raw)
            content = reply["choices"][0]["message"]["content"]
            usage = reply.get("usage") or {}
            counts = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise _BadReplyError(f"not a chat reply: {raw[:80]!r}") from error
        with self._lock:
            self.num_tokens = [total + count for total, count in zip(self.num_tokens, counts)]
        return content if isinstance(content, str) else ""

    def _wait(self) -> None:
        while (left := self._quiet_until - time.monotonic()) > 0:
            time.sleep(left)

    def _pause(self, attempt: int, told: float | None) -> None:
        """Wait before the next try; a rate limit holds for every thread."""
        own = min(60.0, self.backoff_s * 2**attempt) * random.uniform(0.5, 1.0)
        if told is not None:
            with self._lock:
                self._quiet_until = max(self._quiet_until, time.monotonic() + min(told, 600.0))
        time.sleep(own if told is None else 0.0)


class _BadReplyError(Exception):
    """The endpoint answered 200 with something that is no chat reply."""


def _key() -> str:
    """From the environment; a line end that a file or a prompt left behind it is no part of it."""
    for name in KEY_VARIABLES:
        key = os.environ.get(name, "").strip()
        if not (key.isascii() and key.isprintable()):  # http.client would refuse it with the key in its message
            raise ValueError(f"the key in {name} holds a control character or one beyond ASCII: set it anew")
        if key:
            return key
    return ""


def image_part(data: bytes, kind: str = "jpeg") -> dict[str, Any]:
    """A picture as a part of a chat message."""
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{base64.b64encode(data).decode()}"}}


def estimate_tokens(characters: int, sizes: Iterable[tuple[int, int]]) -> int:
    """About how many prompt tokens a text and some pictures cost; rather too many than too few.

    Args:
        sizes: Height and width of each picture. The larger of two published rules counts: OpenAI's (tiles of 512 pixels
            after fitting the picture into 2,048 with a short side of 768) and Qwen's (patches of 28 pixels).
    """
    total = math.ceil(characters / 4)
    for height, width in sizes:
        scale = min(1.0, 2048 / max(height, width), 768 / min(height, width))
        tiles = math.ceil(height * scale / 512) * math.ceil(width * scale / 512)
        total += max(85 + 170 * tiles, math.ceil(height / 28) * math.ceil(width / 28))
    return total


def json_answer(text: str) -> dict[str, Any] | None:
    """The last JSON object in an answer, whatever stands around it (thoughts, code fences); None if there is none."""
    decoder = json.JSONDecoder()
    found: dict[str, Any] | None = None
    position = text.find("{")
    while position >= 0:
        try:
            value, stop = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            stop = position + 1
        else:
            found = value if isinstance(value, dict) else found
        position = text.find("{", stop)
    return found


def _retry_after(value: str | None) -> float | None:
    """Seconds; dates, which the header also allows, are left to the usual back-off."""
    try:
        return max(0.0, float(value)) if value else None
    except ValueError:
        return None


def _first_words(error: urllib.error.HTTPError) -> str:
    try:
        return " ".join(error.read(300).decode("utf-8", "replace").split())
    except (OSError, http.client.HTTPException):
        return ""


def _fix(code: int) -> str:
    if code in (401, 403):
        return f"set a valid key in {' or '.join(KEY_VARIABLES)}"
    if code == 404:
        return "check the address (usually it ends in /v1) and the model's name"
    return "check what the model accepts"
