"""Questions with pictures to a judge: answers validated, asked again when unusable, and cached on disk."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from varedit.data.judge_client import (
    ANSWER_TOKENS,
    JudgeClient,
    JudgeSilentError,
    estimate_tokens,
    image_part,
    json_answer,
)
from varedit.evaluation.cases import picture_digest

logger = logging.getLogger(__name__)

MAX_SILENT = 8
"""Questions in a row without any answer after which the endpoint counts as down: nothing more is asked, only the cache
answers. One is enough where it never answered at all."""


class NoAnswer(ValueError):
    """A model gave no usable answer after all tries, or may not be asked any more."""


@dataclass(frozen=True)
class Question:
    """What is asked once, and what its answer has to be.

    Attributes:
        prompt: the text. pictures: uint8 (H, W, 3), shown after it in order.
        number: of scores that the answer has to hold. low, high: the range of each.
        repeat: number of this judgement of the same pictures.
    """

    prompt: str
    pictures: tuple[np.ndarray, ...]
    number: int
    low: float
    high: float
    repeat: int = 0


@dataclass(frozen=True)
class Budget:
    """What judging may cost.

    Attributes:
        prices: of a million prompt and a million answer tokens, in any currency.
        limit: beyond which nothing is asked any more, in the same currency; None is no limit.
    """

    prices: tuple[float, float]
    limit: float | None = None

    def cost(self, prompt_tokens: int, answer_tokens: int) -> float:
        return (prompt_tokens * self.prices[0] + answer_tokens * self.prices[1]) / 1e6


def parse_scores(text: str, number: int, low: float, high: float) -> list[float]:
    """The numbers of a judge's answer.

    Raises:
        ValueError: no JSON object with "score", a wrong number of values, or one out of range: nothing is guessed.
    """
    answer = json_answer(text)
    if answer is None or "score" not in answer:
        raise ValueError(f"no JSON object with a score in {text[:60]!r}")
    values = answer["score"]
    if not isinstance(values, list) or len(values) != number:
        raise ValueError(f"score {values!r} is no list of {number}")
    if not all(type(value) in (int, float) and low <= value <= high for value in values):
        raise ValueError(f"score {values!r} leaves {low:g} to {high:g}")
    return [float(value) for value in values]


class Chat:
    """A model with a cache of its answers.

    Args:
        client: the endpoint and the model; it waits for rate limits and tries again after failures.
        cache: folder of answers, keyed by model, temperature, prompt, pictures and repeat; usable answers only.
        tries: how often a question is asked when the answer is unusable.
        budget: prices and limit, if known.
    """

    def __init__(self, client: JudgeClient, cache: Path, tries: int = 3, budget: Budget | None = None) -> None:
        self.client, self.cache, self.tries, self.budget = client, cache, tries, budget
        self.num_cached, self.num_repeated = 0, 0
        self._silent, self._answered = 0, False
        self._lock = threading.Lock()

    def ask(self, question: Question) -> list[float]:
        """The scores of one answer.

        Raises:
            JudgeError: the endpoint refused or did not answer.
            NoAnswer: no answer was usable (the message says how the last one failed), the budget is spent, or the
                endpoint has been silent too often.
        """
        path = self._path(question)
        known = self._cached(path, question)
        if known is not None:
            with self._lock:
                self.num_cached += 1
            return known
        messages = [_message(question)]
        reason = ""
        for attempt in range(self.tries):
            self._check_budget()
            if attempt:
                with self._lock:
                    self.num_repeated += 1
            text = self._send(messages)
            try:
                answer = _parse(text, question)
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

    def _send(self, messages: list[dict[str, Any]]) -> str:
        with self._lock:
            if self._silent >= (MAX_SILENT if self._answered else 1):
                raise NoAnswer(f"the judge did not answer {self._silent} times in a row; run again when it does")
        try:
            text = self.client.ask(messages)
        except JudgeSilentError:
            with self._lock:
                self._silent += 1
            raise
        with self._lock:
            self._silent, self._answered = 0, True
        return text

    def estimate(self, questions: Iterable[Question]) -> str:
        """What asking will cost, in words, before anything is asked.

        Raises:
            ValueError: more than the budget's limit.
        """
        todo, cached, prompt_tokens = 0, 0, 0
        for question in questions:
            if self._cached(self._path(question), question) is not None:
                cached += 1
                continue
            todo += 1
            prompt_tokens += estimate_tokens(len(question.prompt), (one.shape[:2] for one in question.pictures))
        answer_tokens = todo * ANSWER_TOKENS
        text = f"judge: {todo} questions to ask ({cached} answered already), about {prompt_tokens:,} prompt and "
        text += f"{answer_tokens:,} answer tokens"
        if self.budget is not None:
            cost = self.budget.cost(prompt_tokens, answer_tokens)
            text += f", about {cost:.2f} in the currency of the prices"
            if self.budget.limit is not None and cost > self.budget.limit:
                raise ValueError(
                    f"{text}: more than the limit of {self.budget.limit:g}; raise it, or judge fewer cases"
                )
        return text

    def account(self) -> str:
        """What was asked so far, in words."""
        tokens = self.client.num_tokens
        text = f"judge: {self.client.num_calls} requests, {self.num_cached} answers from the cache, "
        text += f"{self.num_repeated} asked again; {tokens[0]:,} + {tokens[1]:,} tokens"
        if self.budget is not None:
            text += f", {self.budget.cost(*tokens):.2f} in the currency of the prices"
        return text

    def _check_budget(self) -> None:
        budget = self.budget
        if budget is not None and budget.limit is not None and budget.cost(*self.client.num_tokens) >= budget.limit:
            raise NoAnswer(f"the judge's limit of {budget.limit:g} is spent")

    def _path(self, question: Question) -> Path:
        client, digests = self.client, [picture_digest(picture) for picture in question.pictures]
        asked = [client.model, client.temperature, client.max_tokens, question.prompt, digests, question.repeat]
        return self.cache / f"{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]}.json"

    def _cached(self, path: Path, question: Question) -> list[float] | None:
        if not path.is_file():
            return None
        try:
            return _parse(json.loads(path.read_text(encoding="utf-8"))["text"], question)
        except (ValueError, KeyError, TypeError):
            logger.warning("cached answer %s is damaged; asking again", path.name)
            return None

    def _keep(self, path: Path, text: str) -> None:
        self.cache.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.tmp")
        value = {"model": self.client.model, "text": text}
        temporary.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
        os.replace(temporary, path)


def _parse(text: str, question: Question) -> list[float]:
    return parse_scores(text, question.number, question.low, question.high)


def _message(question: Question) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "text", "text": question.prompt}]
    content += [image_part(_png(picture), "png") for picture in question.pictures]
    return {"role": "user", "content": content}


def _png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()
