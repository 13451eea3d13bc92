"""Best of N: several seeds of one edit, ranked by how well the instruction is met and how little else changed."""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from varedit import quantizer
from varedit.editing.crop import cut
from varedit.editing.edit import EditRequest, EditResult, Settings, apply_edits
from varedit.editing.mask import model_mask, token_coverage
from varedit.image_processor import ImageInput, load_image, prepare
from varedit.pipeline import MAX_SEED, VAREditPipeline, check_seed
from varedit.text import encode_prompts, pad_text

Scorer = Callable[[VAREditPipeline, Sequence[EditResult]], Sequence[float]]
"""(pipeline, edits of one picture by one instruction) -> how well each meets the instruction; more is better."""

STRAY_WEIGHT = 10.0
"""A tenth of the picture changed astray costs as much as one standard deviation of the instruction score."""

MAX_CANDIDATES = 64


@dataclass(frozen=True, eq=False)
class Candidate:
    """One of the edits tried.

    Attributes:
        result: the edit.
        instruction_score: of the scorer, in its own unit.
        stray: share of the picture, 0 to 1, that changed where it should not have, see `stray_changes`.
        value: what candidates are ranked by: the instruction score in standard deviations from the mean of all
            candidates, less `STRAY_WEIGHT` times `stray`.
    """

    result: EditResult
    instruction_score: float
    stray: float
    value: float


def best_of(
    pipeline: VAREditPipeline,
    image: ImageInput,
    prompt: str,
    num_candidates: int,
    *,
    seed: int | None = None,
    settings: Settings | None = None,
    mask: Image.Image | None = None,
    scorer: Scorer | None = None,
    batch_size: int = 8,
) -> list[Candidate]:
    """Edit with several seeds and rank the results, best first; equal ones keep the order of their seeds.

    Args:
        num_candidates: N, from 1 to `MAX_CANDIDATES`.
        seed: of the first candidate; the others count on from it, so one number repeats them all. None draws one.
        scorer: None is `instruction_evidence`.
        batch_size: candidates edited in one call.

    Raises:
        ValueError: see `apply_edit`; also an impossible number of candidates, or settings that leave nothing to chance.
    """
    check_num_candidates(num_candidates)
    source = load_image(image)
    first = secrets.randbelow(2**31) if seed is None else seed
    check_seed(first)
    resolved = (settings or Settings()).resolved(pipeline)
    # Of two values of a bit one always has half of the probability: top-p up to that takes the likelier one.
    if num_candidates > 1 and (not resolved.temperature or (resolved.top_p or 1) <= 0.5):
        raise ValueError(
            f"best of {num_candidates} at temperature {resolved.temperature} and top-p {resolved.top_p} makes one edit "
            "several times; raise the temperature, and top-p above 0.5"
        )
    seeds = [(first + index) % (MAX_SEED + 1) for index in range(num_candidates)]
    results: list[EditResult] = []
    for start in range(0, num_candidates, batch_size):
        requests = [EditRequest(source, prompt, number, mask) for number in seeds[start : start + batch_size]]
        results += apply_edits(pipeline, requests, settings)
    return rank(results, (scorer or instruction_evidence)(pipeline, results))


def check_num_candidates(count: int) -> None:
    """Raise ValueError if nobody could try so many."""
    if not 1 <= count <= MAX_CANDIDATES:
        raise ValueError(f"best of {count} is not possible; choose from 1 to {MAX_CANDIDATES}")


def rank(results: Sequence[EditResult], instruction_scores: Sequence[float]) -> list[Candidate]:
    """Candidates, best first."""
    scores = np.asarray(instruction_scores, np.float64)
    spread = scores.std()
    standard = (scores - scores.mean()) / spread if spread > 0 else np.zeros(len(scores))
    strays = stray_changes(results)
    candidates = [
        Candidate(result, float(score), stray, float(part - STRAY_WEIGHT * stray))
        for result, score, part, stray in zip(results, scores, standard, strays)
    ]
    return sorted(candidates, key=lambda candidate: -candidate.value)


def stray_changes(results: Sequence[EditResult]) -> list[float]:
    """Share of the picture that each edit changed astray.

    With a mask, what the model changed outside it (it was put back, but an edit that tried may be cut off at the
    border); nothing where it was free to, see `EditResult.released`. Without one nobody knows what should have changed,
    so the candidates vote: astray is what fewer than half of them changed. Two candidates cannot outvote each other,
    and without change maps there is no vote: then all is 0.
    """
    maps = [result.change_map for result in results]
    if any(change is None for change in maps):
        return [0.0] * len(results)
    known = [change for change in maps if change is not None]
    if all(change.stray is not None for change in known):
        return [0.0 if r.released else float(change.stray or 0.0) for r, change in zip(results, known)]
    changed = [_resized(change.hard_HW, known[0].hard_HW.shape) for change in known]
    votes = np.mean(changed, axis=0)
    return [float((changed_HW & (votes < 0.5)).mean()) for changed_HW in changed]


def _resized(changed_HW: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A map of the same picture at another size: crops that differ give maps that do."""
    return np.asarray(Image.fromarray(changed_HW).resize((shape[1], shape[0]), Image.Resampling.NEAREST))


@torch.no_grad()
def instruction_evidence(pipeline: VAREditPipeline, results: Sequence[EditResult]) -> list[float]:
    """How much likelier the model finds its bits with the instruction than without, in nats a token.

    log p(bits | source, instruction) - log p(bits | source), summed over all bits, at temperature 1 and without
    guidance. By Bayes' rule this is the model's own log p(instruction | source, edit) up to a constant that is the same
    for all candidates: does the model itself recognise its instruction in the edit? Bits that a lock took from the
    source were not the model's to choose and do not count.

    It needs no other model, and so it knows nothing that this one does not: an edit that the model misunderstands in
    the same way each time scores well. It costs one pass through the transformer a candidate. For a judge with eyes of
    its own pass another `Scorer`.
    """
    return [_evidence(pipeline, result) for result in results]


def _evidence(pipeline: VAREditPipeline, result: EditResult) -> float:
    tokenizer, schedule = pipeline.image_tokenizer, result.schedule
    device, patch_size = pipeline._execution_device, tokenizer.config.patch_size
    assert result.settings.size is not None and result.settings.fit is not None
    prepared = prepare(cut(result.source, result.box), result.settings.size, result.settings.fit)
    mask_HW = None
    if result.area is not None and result.settings.lock != "off":
        mask_HW = model_mask(result.area if result.box is None else result.area.crop(result.box), prepared)
    source_BSC = quantizer.patchify(tokenizer.encode(prepared.image_B3HW.to(device)), patch_size)
    source_BChw = source_BSC.transpose(1, 2).unflatten(2, schedule.finest)
    max_tokens = pipeline.transformer.config.max_text_tokens
    states = encode_prompts([result.prompt], pipeline.tokenizer, pipeline.text_encoder, max_tokens, device=device)
    text_BTF, text_mask_BT = (torch.cat([part, part]).to(device) for part in pad_text(states))
    cache = pipeline.transformer(  # first row with the instruction, second without
        schedule,
        source_BChw=torch.cat([source_BChw, source_BChw]),
        text_BTF=text_BTF,
        text_mask_BT=text_mask_BT,
        drop_text_B=torch.tensor([False, True], device=device),
    )
    canvas = quantizer.empty_canvas(1, tokenizer.config.num_code_bits, schedule, patch_size, device)
    total, inputs_BlC = 0.0, None
    for scale, part in enumerate(result.bits):
        if scale:
            inputs_BlC = quantizer.next_input(canvas, schedule, scale, patch_size).expand(2, -1, -1)
        logits_BlC2 = pipeline.transformer(schedule, inputs_BlC, scale=scale, cache=cache)
        margin_BlC = (logits_BlC2[..., 1] - logits_BlC2[..., 0]).float()
        bits_BChw = part.permute(2, 0, 1)[None].to(device, torch.bool)
        bits_BlC = quantizer.patchify(bits_BChw.float(), patch_size) > 0.5
        log_p_BlC = F.logsigmoid(torch.where(bits_BlC, margin_BlC, -margin_BlC)).cpu().double()  # MPS has no float64
        gain_1lC = log_p_BlC[:1] - log_p_BlC[1:]
        if mask_HW is not None:
            free_hw = token_coverage(mask_HW, schedule, scale, patch_size) > 0
            gain_1lC = gain_1lC * quantizer.patchify(free_hw.float().expand_as(bits_BChw), patch_size)
        total += float(gain_1lC.sum())
        canvas = quantizer.accumulate(canvas, bits_BChw)
    return total / schedule.offsets[-1]
