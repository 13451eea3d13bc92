"""Questions with pictures to a judge: answers validated, asked again when unusable, and cached on disk."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from varedit.data.judge_client import JudgeClient, image_part
from varedit.evaluation.cases import picture_digest

logger = logging.getLogger(__name__)
Answer = TypeVar("Answer")


class NoAnswer(ValueError):
    """A model gave no usable answer after all tries."""


class Chat:
    """A model with a cache of its answers.

    Args:
        client: the endpoint and the model; it waits for rate limits and tries again after failures.
        cache: folder of answers, keyed by model, prompt and pictures; usable answers only.
        tries: how often a question is asked when the answer is unusable.
    """

    def __init__(self, client: JudgeClient, cache: Path, tries: int = 3) -> None:
        self.client, self.cache, self.tries = client, cache, tries
        self.num_cached, self.num_repeated = 0, 0
        self._lock = threading.Lock()

    def ask(
        self, prompt: str, pictures: Sequence[np.ndarray], parse: Callable[[str], Answer], repeat: int = 0
    ) -> Answer:
        """Ask once and give the parsed answer.

        Args:
            pictures: uint8 (H, W, 3), shown after the text in order.
            parse: turns the text into an answer, or raises ValueError: then the model is told so and asked again.
            repeat: number of this judgement of the same question; later ones say so to the model, because the client
                asks at temperature 0.

        Raises:
            JudgeError: the endpoint refused or did not answer.
            NoAnswer: no answer was usable; the message says how the last one failed.
        """
        if repeat:
            prompt += f"\nThis is judgement {repeat + 1} of the same pictures: look afresh."
        digests = [picture_digest(picture) for picture in pictures]
        asked = json.dumps([self.client.model, self.client.max_tokens, prompt, digests])
        path = self.cache / f"{hashlib.sha256(asked.encode()).hexdigest()[:32]}.json"
        if path.is_file():
            try:
                answer = parse(json.loads(path.read_text(encoding="utf-8"))["text"])
            except (ValueError, KeyError, TypeError):
                logger.warning("cached answer %s is damaged; asking again", path.name)
            else:
                with self._lock:
                    self.num_cached += 1
                return answer
        messages = [_message(prompt, pictures)]
        reason = ""
        for attempt in range(self.tries):
            if attempt:
                with self._lock:
                    self.num_repeated += 1
            text = self.client.ask(messages)
            try:
                answer = parse(text)
            except ValueError as error:
                reason = str(error)
                correction = f"That answer cannot be used: {reason}. Answer with the JSON object alone."
                messages = [
                    messages[0], {"role": "assistant", "content": text}, {"role": "user", "content": correction},
                ]  # fmt: skip
            else:
                self._keep(path, text)
                return answer
        raise NoAnswer(f"no usable answer in {self.tries} tries; the last: {reason}")

    def _keep(self, path: Path, text: str) -> None:
        self.cache.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{threading.get_ident()}.tmp")
        value = {"model": self.client.model, "text": text}
        temporary.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
        os.replace(temporary, path)

    def account(self, prices: tuple[float, float] | None = None) -> str:
        """What was asked so far, in words; `prices` are for a million prompt and completion tokens."""
        tokens = self.client.num_tokens
        text = f"judge: {self.client.num_calls} requests, {self.num_cached} answers from the cache, "
        text += f"{self.num_repeated} asked again; {tokens[0]} + {tokens[1]} tokens"
        if prices is not None:
            text += f", {(tokens[0] * prices[0] + tokens[1] * prices[1]) / 1e6:.2f} in the currency of the prices"
        return text


def _message(prompt: str, pictures: Sequence[np.ndarray]) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "text", "text": prompt}]
    content += [image_part(_png(picture), "png") for picture in pictures]
    return {"role": "user", "content": content}


def _png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()
