"""Finding bad pairs before they are trained on: in the pictures, between them, between pairs, and in the words."""

from __future__ import annotations

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from varedit.alignment import find_motion
from varedit.data.faults import FAULTS, FaultError, Skipped, pixels_of
from varedit.data.record import Record
from varedit.data.wording import contradiction, foreign, is_empty

logger = logging.getLogger(__name__)

CHECKS: dict[str, str] = {
    **dict.fromkeys(FAULTS, "the pair cannot be read"),
    "tiny image": "a side is shorter than min_side",
    "misaligned": "what the edit left unchanged is shifted or zoomed",
    "unchanged": "source and target look the same",
    "everything changed": "nothing of the source is left, and the instruction does not ask for that",
    "near duplicate": "an earlier pair has nearly the same source and target",
    "empty instruction": "no words",
    "contradictory instruction": "cannot be followed",
    "wrong language": "not in the language asked for",
}

MIN_SIDE = 64
BLOCK = 8  # pixels: differences are averaged over blocks, so that compression noise does not count
CHANGED = 12.0  # grey levels of a block's mean difference
MIN_MEAN_CHANGE = 3.0  # grey levels over the whole picture: a slight change of tone is a change
ALL_CHANGED = 0.9  # of the blocks
GLOBAL_TYPES = {"tone", "style", "weather", "background", "global", "season", "transform", "motion", "composition"}
# Words of instructions that may change every pixel, or move them all.
_GLOBAL_WORDS = re.compile(
    r"\b(backgrounds?|backdrop|behind|setting|scene|scenery|sky|image|picture|photo|photograph|everything|whole|entire"
    r"|all|every|style|painting|drawing|sketch|cartoon|anime|watercolou?r|pixel|render\w*|filter|tones?|brightness|contrast"
    r"|brighte\w+|darke\w+|lighting|lights?|exposure|saturat\w+|desaturat\w+|colou?rs|colou?rful|vivid|greyscale|grayscale"
    r"|monochrome|black and white|sepia|negative|invert\w*|warmer|cooler|colder|blur\w*|sharpe\w+|soft\w*|noise|fog\w*"
    r"|mist\w*|snow\w*|rain\w*|downpour|storm\w*|weather|sunn?\w*|night\w*|day\w*|dusk|dawn|summer|winter|spring|autumn|fall"
    r"|season|vintage|retro|tint\w*|hue|it|zoom\w*|crop\w*|camera|angle|view\w*|closer|perspective)\b"
)
_MOVING_WORDS = re.compile(
    r"\b(mirror\w*|flip\w*|rotat\w*|upside|zoom\w*|crop\w*|camera|angle|view\w*|closer|perspective|shift\w*|mov\w+"
    r"|slid\w+|scale\w*|resiz\w*|enlarg\w+|shrink\w*|bigger|smaller|larger|straighten|tilt\w*|recenter|cent(er|re))\b"
)
HASH_BITS = 64
MAX_HASH_DISTANCE = 3  # below the number of bands, so that one band is always equal
THUMBNAIL = 16
MAX_THUMBNAIL_MEAN = 4.0  # grey levels between near duplicates
MAX_THUMBNAIL_CELL = 12.0
MAX_CANDIDATES = 64  # pairs compared in full for one hash band: flat pictures share theirs


@dataclass(frozen=True)
class Finding:
    """One thing wrong with one pair.

    Attributes:
        position: Of the pair in the source, counting from 0 and counting what cannot be read.
        origin: As in `Record`. check: A key of `CHECKS`. detail: In words, with numbers.
        instruction: The main phrasing; empty if the pair cannot be read.
    """

    position: int
    origin: str
    check: str
    detail: str
    instruction: str = ""


@dataclass
class LintReport:
    """What was found.

    Attributes:
        num_pairs: Everything looked at, readable or not.
        findings: In the order of the source. pictures: Thumbnails of the first findings of each check, by position:
            uint8 arrays of source and target.
    """

    num_pairs: int = 0
    findings: list[Finding] = field(default_factory=list)
    pictures: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        """Pairs with a finding of each check."""
        found = Counter(check for _, check in {(finding.position, finding.check) for finding in self.findings})
        return {check: found[check] for check in CHECKS if found[check]}

    @property
    def num_flagged(self) -> int:
        """Pairs with at least one finding."""
        return len({finding.position for finding in self.findings})


@dataclass(frozen=True)
class LintOptions:
    """What to hold pairs against.

    Attributes:
        min_side: Shortest side in pixels that is not tiny.
        language: Of the instructions; None leaves languages alone.
        num_thumbnails: Findings of each check that keep their pictures for the report.
    """

    min_side: int = MIN_SIDE
    language: str | None = "en"
    num_thumbnails: int = 50


def lint(items: Iterable[Record | Skipped], options: LintOptions | None = None) -> LintReport:
    """Look at every pair. Memory grows by about 2 kB a pair, for finding near duplicates.

    Args:
        items: What `read` yields.
        options: None for the defaults.

    Raises:
        ValueError: A minimal side below 1, or a source without a single item.
    """
    options = options or LintOptions()
    if options.min_side < 1:
        raise ValueError(f"min_side is {options.min_side}: use at least 1")
    report, duplicates = LintReport(), Duplicates()
    shown: Counter[str] = Counter()
    for position, item in enumerate(items):
        report.num_pairs += 1
        if isinstance(item, Skipped):
            report.findings.append(Finding(position, item.origin, item.fault, item.detail))
            continue
        pixels: list[np.ndarray] = []
        for check, detail in _checks(item, options, duplicates, pixels):
            report.findings.append(Finding(position, item.origin, check, detail, item.instruction))
            if pixels and shown[check] < options.num_thumbnails:
                shown[check] += 1
                report.pictures[position] = (thumbnail(pixels[0]), thumbnail(pixels[1]))
    if report.num_pairs == 0:
        raise ValueError("the source holds no pairs: check its path, or name its format")
    return report


def _checks(
    record: Record, options: LintOptions, duplicates: Duplicates, pixels: list[np.ndarray]
) -> Iterator[tuple[str, str]]:
    """Check and detail of everything wrong with one pair; its pictures are left in `pixels`."""
    fault: FaultError | None = None
    try:  # before anything is found, so that every finding can be shown with the pictures
        pixels += [pixels_of(record.source), pixels_of(record.target)]
    except FaultError as error:
        fault = error
    yield from _word_checks(record, options.language)
    if fault is not None:
        yield fault.fault, str(fault)
        return
    source, target = pixels
    height, width = source.shape[:2]
    if target.shape != source.shape:
        yield "sizes differ", f"source {width} x {height}, target {target.shape[1]} x {target.shape[0]}"
        return
    if min(height, width) < options.min_side:
        yield "tiny image", f"{width} x {height} pixels, less than {options.min_side}"
    yield from _pair_checks(record, source, target)
    earlier = duplicates.add(record.origin, source, target)
    if earlier is not None:
        yield "near duplicate", f"of {earlier}"


def _word_checks(record: Record, language: str | None) -> Iterator[tuple[str, str]]:
    for number, text in enumerate(record.instructions):
        place = f"phrasing {number + 1}: " if number else ""
        if is_empty(text):
            yield "empty instruction", f"{place}{text!r}"
            continue
        reason = foreign(text, language) if language else None
        if reason:
            yield "wrong language", f"{place}{reason}"
            continue
        reason = contradiction(text)
        if reason:
            yield "contradictory instruction", f"{place}{reason}"


def _pair_checks(record: Record, source: np.ndarray, target: np.ndarray) -> Iterator[tuple[str, str]]:
    difference = block_difference(source, target)
    strongest, mean = float(difference.max()), float(difference.mean())
    if strongest < CHANGED and mean < MIN_MEAN_CHANGE:
        yield "unchanged", f"strongest block {strongest:.1f}, mean {mean:.1f} of 255 levels"
        return
    words = " ".join(record.instructions).lower()
    if not _MOVING_WORDS.search(words):
        motion = find_motion(source, target)
        if motion is not None:
            yield (
                "misaligned",
                f"shifted by {motion.shift_x:+.1f}, {motion.shift_y:+.1f} pixels, zoomed by {motion.zoom:.3f} "
                f"({motion.share:.0%} of the picture agrees)",
            )
            return  # whatever moves, changes everywhere
    changed = float((difference > CHANGED).mean())
    is_global = record.edit_type in GLOBAL_TYPES or _GLOBAL_WORDS.search(words) or _MOVING_WORDS.search(words)
    if changed > ALL_CHANGED and not is_global:
        yield "everything changed", f"{changed:.0%} of the picture differs"


def block_difference(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Mean difference of each block in grey levels, its largest channel; float32 (rows, columns)."""
    height, width = source.shape[:2]
    step = min(BLOCK, height, width)
    rows, columns = height // step * step, width // step * step
    apart = np.abs(source[:rows, :columns].astype(np.int16) - target[:rows, :columns])
    blocks = apart.reshape(rows // step, step, columns // step, step, 3).mean(axis=(1, 3), dtype=np.float32)
    return blocks.max(axis=-1)


def thumbnail(pixels: np.ndarray, side: int = 160) -> np.ndarray:
    """The picture with its longer side at most `side`."""
    image = Image.fromarray(pixels)
    image.thumbnail((side, side))
    return np.asarray(image)


# ---- near duplicates -----------------------------------------------------------------------------------------------
def perceptual_hash(pixels: np.ndarray) -> int:
    """64 bits: the signs of the lowest frequencies against their median, as in the usual pHash."""
    grey = np.asarray(Image.fromarray(pixels).convert("L").resize((32, 32), Image.Resampling.BOX), np.float32)
    angle = np.pi / 32 * (np.arange(32) + 0.5)[None, :] * np.arange(9)[:, None]
    low = (np.cos(angle) @ grey @ np.cos(angle).T)[1:, 1:].ravel()
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")


class Duplicates:
    """Pairs seen so far, found again by the perceptual hash of the source and held against small copies of both."""

    def __init__(self) -> None:
        self._bands: list[dict[int, list[int]]] = [defaultdict(list) for _ in range(MAX_HASH_DISTANCE + 1)]
        self._hashes: list[int] = []
        self._copies: list[np.ndarray] = []
        self._origins: list[str] = []

    def add(self, origin: str, source: np.ndarray, target: np.ndarray) -> str | None:
        """Remember a pair; the origin of an earlier pair that is nearly the same, or None."""
        code = perceptual_hash(source)
        copies = np.stack([_small(source), _small(target)])
        found = next((number for number in self._candidates(code) if self._alike(number, copies)), None)
        for band, part in zip(self._bands, _parts(code)):
            band[part].append(len(self._origins))
        self._hashes.append(code)
        self._copies.append(copies)
        self._origins.append(origin)
        return None if found is None else self._origins[found]

    def _candidates(self, code: int) -> Iterator[int]:
        for band, part in zip(self._bands, _parts(code)):
            for number in band[part][-MAX_CANDIDATES:]:
                if (self._hashes[number] ^ code).bit_count() <= MAX_HASH_DISTANCE:
                    yield number

    def _alike(self, number: int, copies: np.ndarray) -> bool:
        apart = np.abs(self._copies[number].astype(np.int16) - copies)
        return bool(apart.mean() <= MAX_THUMBNAIL_MEAN and apart.max() <= MAX_THUMBNAIL_CELL)


def _parts(code: int) -> list[int]:
    bits = HASH_BITS // (MAX_HASH_DISTANCE + 1)
    return [code >> (bits * number) & ((1 << bits) - 1) for number in range(MAX_HASH_DISTANCE + 1)]


def _small(pixels: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX))


def table(report: LintReport, source: str) -> dict[str, Any]:
    """The report as plain JSON values."""
    return {
        "source": source,
        "num_pairs": report.num_pairs,
        "num_flagged": report.num_flagged,
        "counts": report.counts,
        "findings": [vars(finding) for finding in report.findings],
    }
