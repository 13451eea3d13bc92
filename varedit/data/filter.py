"""The paper's filter for training pairs (appendix A.1, figure 8): a vision-language model looks at each pair.

Two questions, both of which must be answered with yes: does the instruction describe exactly the difference between
the pictures, nothing missing and nothing extra; and are both pictures sharp and undistorted. The wording is ours.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import os
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from varedit.data.faults import FaultError, Skipped, image_hw, pixels_of
from varedit.data.judge_client import ANSWER_TOKENS, JudgeClient, estimate_tokens, image_part, json_answer
from varedit.data.record import Picture, Record

logger = logging.getLogger(__name__)

SYSTEM = (
    "You check training examples for an image editing model. Each example is a picture before an edit, the picture "
    "after it, and the instruction that is meant to lead from the first to the second. Be strict: an example that "
    "teaches something wrong does more harm than one that is missing."
)
QUESTION = (
    "The first picture is before the edit, the second is after it.\nInstruction: {instruction}\n\n"
    "1. Say in one sentence what differs between the two pictures. Does the instruction describe exactly this "
    "difference? All that it asks for must have been done, and nothing it does not ask for may have changed.\n"
    "2. Are both pictures sharp, free of distortion and of visible artefacts?\n\n"
    'Answer with one JSON object and nothing else: {{"difference": "...", "matches": true or false, '
    '"sharp": true or false}}'
)
REMINDER = (
    "That was not the JSON object asked for. Answer only with "
    '{"difference": "...", "matches": true or false, "sharp": true or false}.'
)
MAX_ASKS = 2  # for one pair, if the first answer makes no sense
MAX_SIDE = 768  # pixels; pictures are sent no larger
QUALITY = 92  # of the JPEG that is sent: artefacts must be those of the pair
NUM_LOCKS = 4096
_START = '{"position": '  # of every verdict's line


@dataclass(frozen=True)
class Verdict:
    """What the judge says of one pair.

    Attributes:
        position: Of the pair in the source, counting what cannot be read too. origin: As in `Record`.
        keep: Both answers are yes.
        matches, sharp: The two answers; None if there is no valid one.
        difference: In the judge's words; or why there is no answer.
        instruction: The main phrasing, empty if the pair could not be read; None in files of earlier versions.
        model: That was asked; None likewise.
    """

    position: int
    origin: str
    keep: bool
    matches: bool | None
    sharp: bool | None
    difference: str
    instruction: str | None = None
    model: str | None = None


@dataclass(frozen=True)
class Estimate:
    """What judging will take.

    Attributes:
        num_calls: Pairs not judged yet. prompt_tokens, answer_tokens: Of all calls together, by rule of thumb.
        cost: In the currency of the prices; None without prices.
    """

    num_calls: int
    prompt_tokens: int
    answer_tokens: int
    cost: float | None

    def __str__(self) -> str:
        price = "no price given" if self.cost is None else f"about {self.cost:.2f} at the given price"
        return (
            f"{self.num_calls} pairs to judge, {2 * self.num_calls} images, about {self.prompt_tokens:,} prompt and "
            f"{self.answer_tokens:,} answer tokens: {price}"
        )


@dataclass
class FilterReport:
    """How many pairs were kept, and why the others were not: "does not match", "not sharp", "no valid answer" or a
    fault's name. `num_calls` requests were sent in this run.
    """

    num_kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    num_calls: int = 0

    def summary(self) -> str:
        text = f"{self.num_kept} kept, {self.dropped.total()} dropped"
        if self.dropped:
            text += f" ({', '.join(f'{name} {count}' for name, count in sorted(self.dropped.items()))})"
        return text


def estimate(
    items: Iterable[Record | Skipped],
    output: Path | None = None,
    *,
    price_in: float | None = None,
    price_out: float | None = None,
) -> Estimate:
    """Tokens and cost of judging what `output` does not hold yet, from the headers of the pictures.

    Args:
        price_in, price_out: Price of a million prompt and answer tokens.

    Raises:
        ValueError: A negative price, or an output that belongs to another source.
    """
    for name, price in (("price_in", price_in), ("price_out", price_out)):
        if price is not None and not price >= 0:
            raise ValueError(f"{name} is {price}: use a price of at least 0")
    done = read_verdicts(output) if output is not None else {}
    num_calls = prompt = 0
    for position, item in enumerate(items):
        if isinstance(item, Skipped) or _is_done(done, position, item):
            continue
        num_calls += 1
        characters = len(SYSTEM) + len(QUESTION) + len(item.instruction)
        prompt += estimate_tokens(characters, _sent_sizes(item))
    answers = num_calls * ANSWER_TOKENS
    cost = None
    if price_in is not None or price_out is not None:
        cost = (prompt * (price_in or 0.0) + answers * (price_out or 0.0)) / 1e6
    return Estimate(num_calls, prompt, answers, cost)


def judge_pairs(
    items: Iterable[Record | Skipped],
    client: JudgeClient,
    output: Path,
    *,
    cache: Path | None = None,
    num_workers: int = 8,
    on_verdict: Callable[[Verdict], None] | None = None,
) -> FilterReport:
    """Ask the judge about every pair and write the verdicts as JSON lines in the order of the source.

    Verdicts are written as they come, and every answer is kept in the cache under the pictures, the prompt and the
    model: a run that was interrupted is continued by the same call, and no answer is paid for twice.

    Args:
        items: What `read` yields, in an order that does not change between runs.
        client: The endpoint.
        output: File of verdicts; also what a continued run starts from.
        cache: File of answers; None puts it beside the output.
        num_workers: Requests under way at once.
        on_verdict: Called for each new verdict, for a progress bar.

    Raises:
        ValueError: Fewer than one worker, an output that belongs to another source or model, or a cache that cannot be
            written; what was answered is kept in the output then.
        JudgeError: The endpoint refuses or stays silent; what was answered is kept.
    """
    if num_workers < 1:
        raise ValueError(f"num_workers is {num_workers}: use at least 1")
    output.parent.mkdir(parents=True, exist_ok=True)
    verdicts = read_verdicts(output)
    others = {verdict.model for verdict in verdicts.values() if verdict.model not in (None, client.model)}
    if others:
        raise ValueError(
            f"{output} holds verdicts of {', '.join(sorted(map(repr, others)))}, not of {client.model!r}: "
            "use that model, or another output"
        )
    start_calls = client.num_calls
    answers = AnswerCache(cache or output.with_name(output.name + ".cache"))
    try:
        with output.open("a", encoding="utf-8") as lines:
            _end_torn_line(output, lines)
            for verdict in _judged(_todo(items, verdicts), client, answers, num_workers):
                lines.write(json.dumps(asdict(verdict)) + "\n")
                lines.flush()
                verdicts[verdict.position] = verdict
                if on_verdict is not None:
                    on_verdict(verdict)
    finally:
        answers.close()
    if not verdicts:
        raise ValueError("the source holds no pairs: check its path, or name its format")
    _write_sorted(output, verdicts)
    report = FilterReport(num_calls=client.num_calls - start_calls)
    for verdict in verdicts.values():
        report.num_kept += verdict.keep
        if not verdict.keep:
            report.dropped[_why(verdict)] += 1
    return report


def read_verdicts(path: Path) -> dict[int, Verdict]:
    """Verdicts by position; a last line that a crash tore is left out.

    Raises:
        ValueError: The file is something else.
    """
    if not path.exists():
        return {}
    try:
        lines = path.read_text("utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"verdicts {path} cannot be read ({error}): name another file") from error
    found = {}
    for number, line in enumerate(lines, 1):
        try:
            verdict = Verdict(**json.loads(line))
        except (ValueError, RecursionError, TypeError) as error:
            # Only what a crash left of a verdict may be cut off: the one line of another file may be all that it has.
            if not line.endswith("\n") and line[: len(_START)] == _START[: len(line)]:
                continue
            raise ValueError(f"{path} line {number} is no verdict ({error}): name another output") from error
        found[verdict.position] = verdict
    return found


def selected(
    items: Iterable[Record | Skipped],
    verdicts: dict[int, Verdict] | None = None,
    flagged: dict[int, tuple[str, str | None]] | None = None,
) -> Iterator[Record | Skipped]:
    """The pairs that the judge kept and lint did not flag; what cannot be read stays, to be counted.

    Args:
        items: What `read` yields for the very source that was judged or linted.
        verdicts: From `read_verdicts`; None keeps all.
        flagged: From `read_flagged`; None flags none.

    Raises:
        ValueError: The verdicts or findings are of another source, or a pair has no verdict yet.
    """
    for position, item in enumerate(items):
        if verdicts is not None and not isinstance(item, Skipped):
            if not _is_done(verdicts, position, item):
                raise ValueError(
                    f"pair {position} ({item.origin!r}) has no verdict: run varedit data filter again, to its end"
                )
            if not verdicts[position].keep:
                continue
        if flagged is not None and position in flagged and not isinstance(item, Skipped):
            _refuse_other("finding", position, *flagged[position], item, "lint this source again")
            continue
        yield item


def _is_done(verdicts: dict[int, Verdict], position: int, item: Record | Skipped) -> bool:
    verdict = verdicts.get(position)
    if verdict is None or (verdict.instruction == "" and isinstance(item, Record) and item.instruction):
        return False  # none, or one from before the pair could be read
    fix = "use the source that was judged, or judge this one into another output; with --cache, no answer is paid twice"
    _refuse_other("verdict", position, verdict.origin, verdict.instruction, item, fix)
    return True


def _refuse_other(
    what: str, position: int, origin: str, instruction: str | None, item: Record | Skipped, fix: str
) -> None:
    """Refuse what was said of another pair: origins that are line numbers stay when lines are deleted or rewritten.

    No instruction was noted by earlier versions, and of pairs that could not be read.
    """
    said = [(origin, item.origin)]
    if instruction and isinstance(item, Record):
        said.append((instruction, item.instruction))
    for about, found in said:
        if about != found:
            raise ValueError(f"the {what} on pair {position} is about {about!r}, the source has {found!r}: {fix}")


# ---- asking ----------------------------------------------------------------------------------------------------------
class AnswerCache:
    """Answers on disk, by what was asked. Safe to use from several threads.

    Attributes:
        error: Why an answer could not be kept (no room, no permission); None as long as all were.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.error: ValueError | None = None
        try:
            self._database = sqlite3.connect(path, check_same_thread=False)
            self._database.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answers TEXT NOT NULL)")
            self._database.commit()
        except sqlite3.Error as error:
            raise ValueError(f"cache {path} cannot be used ({error}): name another file") from error
        self._lock = threading.Lock()

    def get(self, key: str) -> list[str]:
        try:
            with self._lock:
                row = self._database.execute("SELECT answers FROM answers WHERE key = ?", (key,)).fetchone()
        except sqlite3.Error as error:
            raise ValueError(f"cache {self._path} cannot be read ({error}): name another file") from error
        return json.loads(row[0]) if row else []

    def put(self, key: str, answers: list[str]) -> None:
        """Kept once this returns, whatever happens next; unless `error` is set, so that an answer still gets used."""
        try:
            with self._lock:
                self._database.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, json.dumps(answers)))
                self._database.commit()
        except sqlite3.Error as error:
            self.error = ValueError(f"cache {self._path} cannot be written ({error}): make room, or name another file")

    def close(self) -> None:
        self._database.close()


def _todo(items: Iterable[Record | Skipped], done: dict[int, Verdict]) -> Iterator[tuple[int, Record | Skipped]]:
    for position, item in enumerate(items):
        if not _is_done(done, position, item):
            yield position, item


def _judged(
    todo: Iterator[tuple[int, Record | Skipped]], client: JudgeClient, cache: AnswerCache, num_workers: int
) -> Iterator[Verdict]:
    """Verdicts as they come. Only a few pairs are held at once; answers under way at an error are still cached."""
    pending: set[Future[Verdict]] = set()
    pool = ThreadPoolExecutor(num_workers, "judge")
    # The same question twice at once would be paid twice: later ones wait for the first.
    locks = [threading.Lock() for _ in range(NUM_LOCKS)]
    try:
        for position, item in todo:
            if cache.error is not None:  # nothing more is paid for; what is under way still becomes verdicts
                break
            pending.add(pool.submit(_verdict, position, item, client, cache, locks))
            if len(pending) >= 2 * num_workers:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
        if cache.error is not None:
            raise cache.error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _verdict(
    position: int,
    item: Record | Skipped,
    client: JudgeClient,
    cache: AnswerCache,
    locks: list[threading.Lock],
) -> Verdict:
    instruction = "" if isinstance(item, Skipped) else item.instruction

    def verdict(keep: bool, matches: bool | None, sharp: bool | None, difference: str) -> Verdict:
        return Verdict(position, item.origin, keep, matches, sharp, difference, instruction, client.model)

    if isinstance(item, Skipped):
        return verdict(False, None, None, f"{item.fault}: {item.detail}")
    try:
        images = [_sent(picture) for picture in (item.source, item.target)]
    except FaultError as error:
        return verdict(False, None, None, f"{error.fault}: {error}")
    question = QUESTION.format(instruction=item.instruction)
    key = cache_key(images, question, client.model)
    with locks[int(key[:8], 16) % NUM_LOCKS]:
        answers = cache.get(key)
        valid = _valid(answers[-1]) if answers else None
        while valid is None and len(answers) < MAX_ASKS:
            answers.append(client.ask(_messages(images, question, answers)))
            cache.put(key, answers)
            valid = _valid(answers[-1])
    if valid is None:
        return verdict(False, None, None, f"no valid answer: {answers[-1][:200]}")
    matches, sharp, difference = valid
    return verdict(matches and sharp, matches, sharp, difference)


def cache_key(images: list[bytes], question: str, model: str) -> str:
    """What an answer is kept under: pictures as sent, prompt and model; lengths keep one from running into another."""
    digest = hashlib.sha256()
    for part in (*images, SYSTEM.encode(), question.encode("utf-8", "surrogatepass"), model.encode()):
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def _messages(images: list[bytes], question: str, answers: list[str]) -> list[dict[str, Any]]:
    user = [*(image_part(data) for data in images), {"type": "text", "text": question}]
    messages: list[dict[str, Any]] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user}]
    for answer in answers:
        messages += [{"role": "assistant", "content": answer[:2000]}, {"role": "user", "content": REMINDER}]
    return messages


def _valid(answer: str) -> tuple[bool, bool, str] | None:
    """Both answers and the difference, or None if they are not what was asked for."""
    values = json_answer(answer)
    if values is None or not isinstance(values.get("matches"), bool) or not isinstance(values.get("sharp"), bool):
        return None
    return values["matches"], values["sharp"], str(values.get("difference", ""))


def _sent(picture: Picture) -> bytes:
    image = Image.fromarray(pixels_of(picture))
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=QUALITY, subsampling=0)
    return stream.getvalue()


def _sent_sizes(record: Record) -> Iterator[tuple[int, int]]:
    """Height and width of the two pictures as they are sent; one that cannot be read is not sent."""
    for picture in (record.source, record.target):
        try:
            height, width = image_hw(picture)
        except FaultError:
            continue
        scale = min(1.0, MAX_SIDE / max(height, width))
        yield math.ceil(height * scale), math.ceil(width * scale)


def _why(verdict: Verdict) -> str:
    if verdict.matches is None:
        return verdict.difference.split(":", 1)[0]
    return "does not match" if not verdict.matches else "not sharp"


def _end_torn_line(path: Path, lines: io.TextIOWrapper) -> None:
    """Cut a last line that a crash tore."""
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        lines.truncate(data.rfind(b"\n") + 1)


def _write_sorted(output: Path, verdicts: dict[int, Verdict]) -> None:
    partial = output.with_name(output.name + ".partial")
    with partial.open("w", encoding="utf-8") as lines:
        for position in sorted(verdicts):
            lines.write(json.dumps(asdict(verdicts[position])) + "\n")
        lines.flush()
        os.fsync(lines.fileno())
    os.replace(partial, output)
