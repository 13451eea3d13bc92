"""A vision-language model as a judge: the paper's GPT scores, VIEScore's, ImgEdit-Bench's.

The prompts are our own words for the published rules, so numbers are comparable with each other, not to the last digit
with published ones; the protocol's hash covers every word of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import combinations
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np

from varedit.data.judge_client import JudgeAccessError
from varedit.evaluation.cases import Benchmark, Case, read_picture
from varedit.evaluation.chat import Chat, Question
from varedit.evaluation.checker import harmonic_mean
from varedit.evaluation.generate import result_path
from varedit.evaluation.metrics import fit_result

ANSWER = '\nAnswer with one JSON object and nothing else: {"score": [NUMBERS], "reason": "at most 30 words"}.'

# Words in capitals are filled in by `fill`, the instruction last: it may hold anything.
EDIT = (
    "You are a professional digital artist who judges how well a picture was edited. The first picture is the "
    "original, the second is the edited one. They may be identical when the edit failed.\n"
    "Give two numbers from 0 to 10.\n"
    "First, success: how well the edited picture follows the instruction. 0 means that nothing asked for is there, 10 "
    "that all of it is.ABSENT\n"
    "Second, restraint: how little was changed beyond the instruction. 0 means that the scene is a completely "
    "different one, 10 that the edit is minimal yet effective.\n"
    "Instruction: INSTRUCTION" + ANSWER.replace("NUMBERS", "success, restraint")
)
ABSENT = " If the instruction names an object that the original does not show, success is 0."

QUALITY = (
    "You are a professional digital artist who judges the quality of a picture that was made by a machine.\n"
    "Give two numbers from 0 to 10.\n"
    "First, naturalness: 0 means that the scene looks wrong (light, shadow, distance, size), 10 that it looks real.\n"
    "Second, cleanliness: 0 means many artifacts (distortions, watermarks, scratches, blurred faces, odd limbs, things "
    "that do not fit together), 10 none." + ANSWER.replace("NUMBERS", "naturalness, cleanliness")
)

RUBRICS = {
    "add": (
        "the asked object is there, of the asked kind, number, colour and place",
        "light, shadow, scale and edges of the new object fit the scene",
        "everything else is as it was",
    ),
    "remove": (
        "the object is gone completely and no other",
        "the gap is filled without traces and with fitting texture",
        "everything else is as it was",
    ),
    "replace": (
        "the old object is gone and the asked one stands there with the asked properties",
        "the new object fits in light, scale and edges",
        "everything else is as it was",
    ),
    "adjust": (
        "the asked property (colour, material, shape, expression) has changed as asked and on the asked object",
        "the changed object looks real and clean",
        "the object's other properties and the rest are as they were",
    ),
    "style": (
        "the whole picture has the asked style",
        "strokes, colours and texture are of one piece and without artifacts",
        "objects, places and composition can still be recognised",
    ),
    "background": (
        "the background is the asked one",
        "foreground and background fit in edges, light and perspective",
        "the foreground is as it was",
    ),
    "extract": (
        "exactly the asked object is cut out and complete",
        "its edges are clean and the ground is plain",
        "the object's own look is unchanged",
    ),
    "action": (
        "the subject does what was asked",
        "pose and anatomy are plausible and clean",
        "identity, clothes and the scene are as they were",
    ),
    "compose": (
        "every part of the instruction is done",
        "all changes look real and fit each other",
        "what no part names is as it was",
    ),
    "uge": (
        "all that was asked is done, with the right objects, numbers and attributes",
        "the result looks seamless and real",
        "nothing changed that was not asked for",
    ),
}
"""ImgEdit-Bench: what adherence, quality and preservation look at, by type of edit."""

IMGEDIT = (
    "You judge how well a picture was edited. The first picture is the original, the second is the edited one.\n"
    "Give three whole numbers from 1 (failed) over 3 (done with clear faults) to 5 (perfect).\n"
    "First, adherence: ADHERENCE.\nSecond, quality: QUALITY.\nThird, preservation: PRESERVATION.\n"
    "The second and the third number must not exceed the first.CAP\n"
    "Instruction: INSTRUCTION" + ANSWER.replace("NUMBERS", "adherence, quality, preservation")
)
CAP = " If anything changed that was not asked for, no number exceeds 3."


def fill(template: str, instruction: str, **words: str) -> str:
    """A prompt with its words in capitals filled in."""
    for name, value in words.items():
        template = template.replace(name, value)
    return template.replace("INSTRUCTION", instruction)


@dataclass(frozen=True)
class Rules:
    """How a case is judged.

    Attributes:
        questions: what is asked of a case, its source and its result.
        scores: named scores from the answers in the same order; the first name is the main one.
        texts: all prompts, for the protocol.
    """

    questions: Callable[[Case, np.ndarray, np.ndarray], list[Question]]
    scores: Callable[[list[list[float]]], dict[str, float]]
    texts: tuple[Any, ...]


def _paper_questions(case: Case, source: np.ndarray, result: np.ndarray) -> list[Question]:
    return [Question(fill(EDIT, case.instruction, ABSENT=ABSENT), (source, result), 2, 0, 10)]


def _paper_scores(answers: list[list[float]]) -> dict[str, float]:
    """GPT-Success, GPT-Overedit, and their harmonic mean of this one case, 0 if either is 0 (paper section A.2.2)."""
    ((success, overedit),) = answers
    return {"balance": harmonic_mean(success, overedit), "success": success, "overedit": overedit}


def _viescore_questions(case: Case, source: np.ndarray, result: np.ndarray) -> list[Question]:
    edit = Question(fill(EDIT, case.instruction, ABSENT=""), (source, result), 2, 0, 10)
    return [edit, Question(QUALITY, (result,), 2, 0, 10)]


def _viescore_scores(answers: list[list[float]]) -> dict[str, float]:
    """SC and PQ are the smaller of their two numbers, O is the root of their product (VIEScore, GEdit-Bench)."""
    consistency, quality = map(min, answers)
    return {"overall": sqrt(consistency * quality), "consistency": consistency, "quality": quality}


def _imgedit_questions(case: Case, source: np.ndarray, result: np.ndarray) -> list[Question]:
    rubric = RUBRICS.get(case.edit_type)
    if rubric is None:
        raise ValueError(f"no rubric for edits of type {case.edit_type!r}; known are {', '.join(RUBRICS)}")
    cap = CAP if case.edit_type == "uge" else ""
    prompt = fill(IMGEDIT, case.instruction, ADHERENCE=rubric[0], QUALITY=rubric[1], PRESERVATION=rubric[2], CAP=cap)
    return [Question(prompt, (source, result), 3, 1, 5)]


def _imgedit_scores(answers: list[list[float]]) -> dict[str, float]:
    """Mean of three numbers from 1 to 5, of which the last two are held down to the first (ImgEdit-Bench)."""
    ((adherence, *others),) = answers
    quality, preservation = (min(value, adherence) for value in others)
    mean = (adherence + quality + preservation) / 3
    return {"mean": mean, "adherence": adherence, "quality": quality, "preservation": preservation}


RULES = {
    "paper": Rules(_paper_questions, _paper_scores, (EDIT, ABSENT)),
    "viescore": Rules(_viescore_questions, _viescore_scores, (EDIT, QUALITY)),
    "imgedit": Rules(_imgedit_questions, _imgedit_scores, (IMGEDIT, CAP, RUBRICS)),
}

ABOUT = {
    "balance": "success and overedit together, case by case, 0 to 10",
    "success": "what was asked is there, 0 to 10",
    "overedit": "nothing else changed, 0 to 10",
    "overall": "consistency and quality together, 0 to 10",
    "consistency": "done and nothing else changed, 0 to 10",
    "mean": "of the three, 1 to 5",
    "adherence": "what was asked is there, 1 to 5",
    "quality": "looks real and clean",
    "preservation": "the rest is as it was, 1 to 5",
}
"""Scores in a few words; of each set of rules, the main one first."""


class Judge:
    """Judges cases by one set of rules, `repeats` times each; a case's score is the mean of its judgements.

    Attributes:
        settings: what belongs to the protocol.
    """

    def __init__(self, chat: Chat, rules: str, repeats: int = 1) -> None:
        if rules not in RULES:
            raise ValueError(f"judge rules {rules!r} are unknown; use {', '.join(RULES)}")
        if repeats < 1:
            raise ValueError(f"judge repeats is {repeats}: use at least 1")
        self.chat, self.rules, self.repeats = chat, RULES[rules], repeats
        self.settings = {
            "rules": rules, "prompts": self.rules.texts, "model": chat.client.model,
            "temperature": chat.client.temperature, "repeats": repeats,
        }  # fmt: skip
        self._seen: dict[str, list[dict[str, float]] | str] = {}

    def __call__(self, case: Case, source: np.ndarray, result: np.ndarray) -> dict[str, float]:
        """Named scores of one case.

        Raises:
            JudgeAccessError: the endpoint refuses the key, the address or the model: all cases would fail.
            ValueError: the judge gave no answer to this case.
        """
        if case.key not in self._seen:
            try:
                self._seen[case.key] = self._judge(case, source, result)
            except JudgeAccessError:
                raise
            except ValueError as error:
                self._seen[case.key] = f"not judged: {error}"
        found = self._seen[case.key]
        if isinstance(found, str):
            raise ValueError(found)
        return {name: float(np.mean([one[name] for one in found])) for name in found[0]}

    def _judge(self, case: Case, source: np.ndarray, result: np.ndarray) -> list[dict[str, float]]:
        return [
            self.rules.scores([self.chat.ask(question) for question in asked])
            for asked in self._questions(case, source, result)
        ]

    def _questions(self, case: Case, source: np.ndarray, result: np.ndarray) -> list[list[Question]]:
        """What is asked of a case, for each of its judgements."""
        once = self.rules.questions(case, source, result)
        return [[replace(question, repeat=repeat) for question in once] for repeat in range(self.repeats)]

    def estimate(self, benchmark: Benchmark, output: Path) -> str:
        """What judging the results in a folder will cost, in words.

        Raises:
            ValueError: more than the limit of the budget.
        """

        def questions() -> Iterator[Question]:
            for case in benchmark.cases:
                try:
                    judgements = self._questions(case, *_pictures(benchmark, case, output)) if case.scored else []
                except ValueError:
                    continue  # no result, or no rule for it: scoring names it
                for asked in judgements:
                    yield from asked

        return self.chat.estimate(questions())

    def prepare(
        self, benchmark: Benchmark, output: Path, workers: int = 1, on_case: Callable[[int], None] | None = None
    ) -> None:
        """Judge all cases that have a result, `workers` at once; scoring then finds every judgement made.

        Args:
            on_case: called with the number of cases gone through.

        Raises:
            JudgeAccessError: the endpoint refuses the key, the address or the model.
        """

        def work(case: Case) -> None:
            try:
                self(case, *_pictures(benchmark, case, output))
            except JudgeAccessError:
                raise
            except ValueError:
                return  # no result, or no answer: scoring names it

        with ThreadPoolExecutor(max(1, workers)) as pool:
            try:
                futures = [pool.submit(work, case) for case in benchmark.cases if case.scored]
                for number, future in enumerate(futures, 1):
                    future.result()
                    if on_case is not None:
                        on_case(number)
            except BaseException:  # interrupted, or refused: ask nothing more
                pool.shutdown(cancel_futures=True)
                raise

    def agreement(self) -> dict[str, Any] | None:
        """How far repeated judgements agree, by score; None without repeats.

        Returns:
            Per score: the share of pairs of judgements of a case that lie within one point, their mean distance, and
            the number of pairs.
        """
        judged = [found for found in self._seen.values() if isinstance(found, list)]
        if self.repeats < 2 or not judged:
            return None
        found = {}
        for name in judged[0][0]:
            gaps = [abs(one[name] - two[name]) for case in judged for one, two in combinations(case, 2)]
            found[name] = {
                "within_one": round(float(np.mean([gap <= 1 for gap in gaps])), 6),
                "mean_distance": round(float(np.mean(gaps)), 6),
                "pairs": len(gaps),
            }
        return found


def _pictures(benchmark: Benchmark, case: Case, output: Path) -> tuple[np.ndarray, np.ndarray]:
    """What a judge is shown: what the editor was given, and the result at its size."""
    before = read_picture(result_path(output, case.previous) if case.previous else case.source)
    after = read_picture(result_path(output, case.key))
    return before, fit_result(after, before.shape[:2], benchmark.fit)


def default_rules(benchmark: str) -> str:
    """The rules of a benchmark: viescore for gedit, imgedit for imgedit, the paper's for all others."""
    return {"gedit": "viescore", "imgedit": "imgedit"}.get(benchmark, "paper")
