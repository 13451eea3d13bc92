"""Results to scores: per case, per type and overall, with bootstrap intervals and a hash of the whole protocol.

`scores.json` holds no times and no chance: scoring the same folder again writes the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from varedit.evaluation import checker, metrics
from varedit.evaluation.cases import Benchmark, Case, Fit, mask_pixels, picture_digest, read_mask, read_picture
from varedit.evaluation.features import Backbones, clip_direction, cosine, dino_embedding, structure_distance
from varedit.evaluation.generate import RUN, case_digest, read_manifest, result_path
from varedit.evaluation.judge import Judge

SCORES, THUMBNAILS = "scores.json", "thumbnails"
NUM_BOOTSTRAP = 2000
DIGITS = 6
"""Scores are rounded to this many decimals: the last bits of a float depend on the machine."""


class Sample:
    """One case with its result, read when needed. Arrays are uint8 (H, W, 3), the mask bool (H, W)."""

    def __init__(self, case: Case, output: Path, fit: Fit, chain: Sequence[Case]) -> None:
        self.case, self.output, self.fit, self.chain = case, output, fit, chain
        self.original = read_picture(result_path(output, case.key))
        self.source = self._given()
        self.result = metrics.fit_result(self.original, self.source.shape[:2], fit)

    def _given(self) -> np.ndarray:
        """What the editor was given: the source, or the result of the turn before."""
        if self.case.previous is None:
            return read_picture(self.case.source)
        return read_picture(result_path(self.output, self.case.previous))

    @cached_property
    def target(self) -> np.ndarray:
        if self.case.target is None:
            raise ValueError("the case has no target")
        return read_picture(self.case.target)

    @cached_property
    def on_target(self) -> np.ndarray:
        """The result at the target's size."""
        return metrics.fit_result(self.original, self.target.shape[:2], self.fit)

    @cached_property
    def mask(self) -> np.ndarray:
        if self.case.mask is None:
            raise ValueError("the case has no mask")
        return read_mask(self.case.mask, self.source.shape[:2])

    @cached_property
    def verdict(self) -> checker.Verdict:
        if self.case.answers is not None:
            return checker.check_any(self.source, self.result, self.case.answers())
        return checker.check(self.source, self.target, self.result, self.mask)

    def stray(self) -> float | None:
        """Share of the frame that changed without being asked; None where all may change and no answer is known."""
        if self.case.answers is not None:
            return self.verdict.stray
        answer = self.source
        if self.mask.mean() >= checker.WHOLE:
            if self.case.target is None or self.target.shape != self.source.shape:
                return None
            answer = self.target
        return float(checker.stray_pixels(self.source, answer, self.result, self.mask).mean())

    def drift(self) -> float | None:
        """Wear since the first turn of the chain; None for a first turn."""
        if len(self.chain) < 2:
            return None
        first = read_picture(self.chain[0].source)
        masks = [read_mask(case.mask, first.shape[:2]) for case in self.chain if case.mask is not None]
        return metrics.drift(first, metrics.fit_result(self.original, first.shape[:2], self.fit), masks)


@dataclass(frozen=True)
class Metric:
    """A score of one case.

    Attributes:
        compute: the score; None where it does not apply.
        better: which way. about: in a few words. uses: the network it needs.
    """

    compute: Callable[[Sample, Backbones], float | None]
    better: Literal["higher", "lower"]
    about: str
    uses: Literal["", "clip", "dino", "structure", "lpips"] = ""


def _clip_dir(sample: Sample, models: Backbones) -> float:
    clip, case = models.clip, sample.case
    _need_captions(case, case.source_caption, case.target_caption)
    pictures = clip.image(sample.source), clip.image(sample.result)
    return clip_direction(*pictures, clip.text(case.source_caption), clip.text(case.target_caption))


def _clip_text(sample: Sample, models: Backbones, picture: np.ndarray) -> float:
    _need_captions(sample.case, sample.case.target_caption)
    return cosine(models.clip.image(picture), models.clip.text(sample.case.target_caption))


def _need_captions(case: Case, *captions: str) -> None:
    if not all(captions):
        raise ValueError("the case has no caption")


def _lpips(sample: Sample, models: Backbones) -> float | None:
    import torch

    if sample.mask.all():
        return None
    pictures = (metrics.background(picture, sample.mask) for picture in (sample.result, sample.source))
    first, second = (torch.from_numpy(p * 2 - 1).float().permute(2, 0, 1)[None] for p in pictures)
    return models.lpips(first, second)


METRICS: dict[str, Metric] = {
    # against a known answer
    "success": Metric(lambda s, m: float(s.verdict.success), "higher", "every part done, nothing else touched"),
    "closer": Metric(lambda s, m: float(s.verdict.closer), "higher", "nearer to the answer than to the source"),
    "half": Metric(lambda s, m: float(s.verdict.half), "higher", "at most half of the way to the answer left"),
    "completeness": Metric(lambda s, m: s.verdict.completeness, "higher", "share of the edit that was done"),
    "preservation": Metric(lambda s, m: s.verdict.preservation, "higher", "1 where nothing strayed"),
    "balance": Metric(lambda s, m: s.verdict.balance, "higher", "done and preserved together, 0 to 10"),
    "outside_psnr": Metric(lambda s, m: s.verdict.outside_psnr, "higher", "dB to the source outside the edit"),
    "l1": Metric(lambda s, m: metrics.l1(s.on_target, s.target), "lower", "mean difference to the answer"),
    "l2": Metric(lambda s, m: metrics.l2(s.on_target, s.target), "lower", "mean squared difference to the answer"),
    "clip_i": Metric(
        lambda s, m: cosine(m.clip.image(s.original), m.clip.image(s.target)), "higher", "CLIP, to the answer", "clip"
    ),
    "dino": Metric(
        lambda s, m: cosine(dino_embedding(m.dino, s.original), dino_embedding(m.dino, s.target)), "higher",
        "DINO, to the answer", "dino",
    ),
    # against captions
    "clip_out": Metric(lambda s, m: _clip_text(s, m, s.original), "higher", "CLIP, to the caption after", "clip"),
    "clip_dir": Metric(_clip_dir, "higher", "CLIP, change of picture against change of caption", "clip"),
    "clip_whole": Metric(
        lambda s, m: max(0.0, _clip_text(s, m, s.result)), "higher", "CLIP, to the caption after", "clip"
    ),
    "clip_edit": Metric(
        lambda s, m: max(0.0, _clip_text(s, m, s.result * s.mask[..., None])), "higher",
        "CLIP of the edited area, to the caption after", "clip",
    ),
    # against the source
    "l1_source": Metric(lambda s, m: metrics.l1(s.result, s.source), "lower", "mean difference to the source"),
    "clip_i_source": Metric(
        lambda s, m: cosine(m.clip.image(s.original), m.clip.image(s.source)), "higher", "CLIP, to the source", "clip"
    ),
    "dino_source": Metric(
        lambda s, m: cosine(dino_embedding(m.dino, s.original), dino_embedding(m.dino, s.source)), "higher",
        "DINO, to the source", "dino",
    ),
    "structure": Metric(
        lambda s, m: structure_distance(m.structure, s.source, s.result), "lower", "of DINO's layouts", "structure"
    ),
    "misalignment": Metric(lambda s, m: metrics.misalignment(s.source, s.result), "lower", "shift, zoom of the frame"),
    "drift": Metric(lambda s, m: s.drift(), "lower", "levels to the first picture of the chain"),
    # against the source, outside the mask
    "stray": Metric(lambda s, m: s.stray(), "lower", "share of the frame changed without being asked"),
    "psnr": Metric(
        lambda s, m: metrics.background_psnr(s.source, s.result, s.mask), "higher", "dB to the source in the background"
    ),
    "mse": Metric(
        lambda s, m: metrics.background_mse(s.source, s.result, s.mask), "lower", "squared difference there"
    ),
    "ssim": Metric(lambda s, m: metrics.background_ssim(s.source, s.result, s.mask), "higher", "SSIM, background"),
    "lpips": Metric(_lpips, "lower", "LPIPS of the background", "lpips"),
}  # fmt: skip

JUDGED = "judge_"
"""Scores of a judge start with this; higher is better for all of them."""


def check_metrics(names: Sequence[str], models: Backbones) -> None:
    """Load what the metrics need, so that a missing network is told before hours of generation.

    Raises:
        ValueError: an unknown metric, or a network or package that is not at hand.
    """
    for name in names:
        if name not in METRICS:
            raise ValueError(f"metric {name!r} is unknown; use {', '.join(METRICS)}")
        if METRICS[name].uses:
            getattr(models, METRICS[name].uses)
    if "ssim" in names:
        metrics.torchmetrics_image()


def score(
    benchmark: Benchmark,
    output: Path,
    names: Sequence[str],
    models: Backbones,
    judge: Judge | None = None,
    on_case: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Score the results in a folder and write `scores.json`.

    Cases without a result, unreadable ones and those the judge gave no answer for are listed with their reasons; no
    mean runs over them.

    Raises:
        ValueError: no case could be scored.
    """
    manifest, chains = read_manifest(output), _lines(benchmark.cases)
    (output / THUMBNAILS).mkdir(exist_ok=True)
    rows: list[dict[str, Any]] = []
    failures = [{"key": key, "reason": reason} for key, reason in benchmark.problems]
    digests: list[list[str]] = []
    for number, case in enumerate(benchmark.cases, 1):
        try:
            asked = case_digest(case)
            digests.append([asked, _answer_digest(case)])
            if case.scored:
                _expect_result(manifest.get(case.key), asked)
                sample = Sample(case, output, benchmark.fit, chains[case.key])
                row = _row(sample, names, models, judge)
                _thumbnails(sample)  # may fail as well, and a case that failed is in no mean
                rows.append(row)
        except ValueError as error:
            failures.append({"key": case.key, "reason": str(error)})
        if on_case is not None:
            on_case(number)
    if not rows:
        raise ValueError(f"no case of {output} could be scored: {failures[0]['reason'] if failures else 'no cases'}")
    protocol = _protocol(benchmark, digests, names, models, judge.settings if judge is not None else None)
    result: dict[str, Any] = {
        "protocol": protocol,
        "protocol_sha256": digest(protocol),
        "run": json.loads((output / RUN).read_text(encoding="utf-8")),
        "notes": benchmark.notes,
        "cases": {
            "total": sum(case.scored for case in benchmark.cases) + len(benchmark.problems),
            "scored": len(rows),
            "resized": sum(row["resized"] for row in rows),
            "failed": failures,
        },
        "agreement": judge.agreement() if judge is not None else None,
        "rows": rows,
    } | _means(rows, benchmark.mean_over)
    result["scores_sha256"] = digest(result)
    write_json(output / SCORES, result)
    return result


def _means(rows: list[dict[str, Any]], mean_over: str) -> dict[str, Any]:
    """Means over all rows, those of each type and those of each further group; and which way each score is better."""
    names = list(dict.fromkeys(name for row in rows for name in row["scores"]))
    types = sorted({row["type"] for row in rows})
    groups = sorted({group for row in rows for group in row["groups"]})
    return {
        "better": {name: METRICS[name].better if name in METRICS else "higher" for name in names},
        "overall": summary(rows, names, "overall", mean_over),
        "types": {kind: summary([row for row in rows if row["type"] == kind], names, kind) for kind in types},
        "groups": {group: summary([row for row in rows if group in row["groups"]], names, group) for group in groups},
    }


def _thumbnails(sample: Sample) -> None:
    """Small copies of what the report shows beside the result; the benchmark is not read again for it."""
    pictures = {"source": sample.source} | ({"target": sample.target} if sample.case.target is not None else {})
    for role, pixels in pictures.items():
        image = Image.fromarray(pixels)
        image.thumbnail((256, 256))
        path = sample.output / THUMBNAILS / f"{sample.case.key}.{role}.webp"
        image.save(path.with_suffix(".tmp"), "WEBP", quality=85)
        os.replace(path.with_suffix(".tmp"), path)


def _lines(cases: Sequence[Case]) -> dict[str, list[Case]]:
    """Every case with the turns before it, from the first to itself."""
    lines: dict[str, list[Case]] = {}
    for case in cases:
        lines[case.key] = [*lines.get(case.previous or "", []), case]
    return lines


def _expect_result(row: dict[str, Any] | None, wanted: str) -> None:
    if row is None:
        raise ValueError("no result yet")
    if row["status"] != "ok":
        raise ValueError(f"no result: {row.get('error', 'unknown reason')}")
    if row["case"] != wanted:
        raise ValueError("the result was made for another case of this key; generate it again")


def _row(sample: Sample, names: Sequence[str], models: Backbones, judge: Judge | None) -> dict[str, Any]:
    case = sample.case
    values = {name: METRICS[name].compute(sample, models) for name in names}
    if judge is not None:
        values |= {JUDGED + name: value for name, value in judge(case, sample.source, sample.result).items()}
    for name, value in values.items():
        if value is not None and not np.isfinite(value):
            raise ValueError(f"{name} is {value}")
    return {
        "key": case.key,
        "type": case.edit_type,
        "groups": list(case.groups),
        "instruction": case.instruction,
        "resized": sample.original.shape != sample.result.shape,
        "scores": {name: None if value is None else round(float(value), DIGITS) for name, value in values.items()},
    }


def _answer_digest(case: Case) -> str:
    """Hash of what a result is held against: the target and the mask."""
    found = []
    for picture, read in ((case.target, read_picture), (case.mask, mask_pixels)):
        try:
            found.append("none" if picture is None else picture_digest(read(picture)))
        except ValueError:
            found.append("unreadable")  # the scores that need it will say so
    return " ".join(found)


def _protocol(
    benchmark: Benchmark,
    digests: list[list[str]],
    names: Sequence[str],
    models: Backbones,
    judge: dict[str, Any] | None,
) -> dict[str, Any]:
    """All that must be equal for two score files to be compared; the editor is not part of it."""
    uses = sorted({METRICS[name].uses for name in names} - {""})
    networks = {use: models.protocol(use) for use in uses}
    exact = {name: value for name, value in vars(checker).items() if name.isupper()}
    return {
        "benchmark": benchmark.name,
        "settings": benchmark.settings,
        "fit": benchmark.fit,
        "mean_over": benchmark.mean_over,
        "num_cases": len(benchmark.cases),
        "cases": digest(digests),
        "metrics": list(names),
        "networks": networks,
        "checker": exact,
        "judge": judge,
    }


def digest(value: Any) -> str:
    """Hash of plain JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


@dataclass(frozen=True)
class Mean:
    """A mean with its 95 % bootstrap interval over n cases."""

    mean: float
    low: float
    high: float
    n: int


def bootstrap(values: Sequence[float] | Sequence[Sequence[float]], label: str) -> Mean:
    """Mean of `values` with a percentile interval; the resamples are a function of `label` and the number alone.

    Args:
        values: one a case; or those of each type, whose means are averaged and which are resampled each by itself.
    """
    strata = [np.asarray(part, np.float64) for part in (values if isinstance(values[0], Sequence) else [values])]
    seed = int.from_bytes(hashlib.sha256(f"{label} {sum(map(len, strata))}".encode()).digest()[:8])
    rng = np.random.default_rng(seed)
    means = np.zeros(NUM_BOOTSTRAP)
    for part in strata:
        means += part[rng.integers(0, len(part), (NUM_BOOTSTRAP, len(part)))].mean(1) / len(strata)
    low, high = np.percentile(means, (2.5, 97.5))
    mean = float(np.mean([part.mean() for part in strata]))
    return Mean(round(mean, DIGITS), round(float(low), DIGITS), round(float(high), DIGITS), sum(map(len, strata)))


def summary(rows: list[dict[str, Any]], names: Sequence[str], label: str, mean_over: str = "cases") -> dict[str, Any]:
    """Means by metric over the rows that have it; over cases, or over the means of types."""
    found = {}
    for name in names:
        having = [row for row in rows if row["scores"].get(name) is not None]
        if having:
            kinds = sorted({row["type"] for row in having}) if mean_over == "types" else [None]
            values = [[row["scores"][name] for row in having if kind in (None, row["type"])] for kind in kinds]
            found[name] = asdict(bootstrap(values, f"{label} {name}"))
    return found


def write_json(path: Path, value: Any) -> None:
    """Write plain values so that equal values give equal bytes."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises:
        ValueError: it cannot be written there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise ValueError(f"{path} cannot be written: {error}") from error
