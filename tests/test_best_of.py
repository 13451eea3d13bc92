"""Best of N: the seeds, the ranking, and what the default score measures."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from varedit import quantizer
from varedit.editing.best_of import STRAY_WEIGHT, best_of, instruction_evidence, rank, stray_changes
from varedit.editing.edit import EditRequest, Settings, apply_edits
from varedit.editing.mask import box_mask
from varedit.image_processor import prepare
from varedit.testing import tiny_pipeline
from varedit.text import encode_prompts, pad_text
from varedit.training.objective import bit_losses


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8))


@pytest.fixture(scope="module")
def results(pipeline, picture):
    return apply_edits(pipeline, [EditRequest(picture, "blur it", seed) for seed in (4, 5, 6)])


def test_candidates_are_the_single_edits_of_consecutive_seeds(pipeline, picture, results):
    found = best_of(pipeline, picture, "blur it", 3, seed=4, batch_size=2)
    assert sorted(candidate.result.seed for candidate in found) == [4, 5, 6]
    for candidate in found:
        single = results[candidate.result.seed - 4]
        assert candidate.result.image.tobytes() == single.image.tobytes()
    assert [c.value for c in found] == sorted((c.value for c in found), reverse=True)


def test_evidence_is_the_likelihood_ratio_of_the_full_pass(pipeline, results):
    """Equal to the loss of the same bits in one pass over all scales, with the instruction and without."""
    for result, evidence in zip(results, instruction_evidence(pipeline, results), strict=True):
        schedule, patch_size = result.schedule, pipeline.image_tokenizer.config.patch_size
        prepared = prepare(result.source, 128)
        features = pipeline.image_tokenizer.encode(prepared.image_B3HW)
        source = quantizer.patchify(features, patch_size).transpose(1, 2).unflatten(2, schedule.finest)
        text, mask = pad_text(encode_prompts([result.prompt], pipeline.tokenizer, pipeline.text_encoder, 64))
        canvas = quantizer.empty_canvas(1, 4, schedule, patch_size)
        inputs, tokens = [], []
        for scale, part in enumerate(result.bits):
            bits = part.permute(2, 0, 1)[None].bool()
            if scale:
                inputs.append(quantizer.next_input(canvas, schedule, scale, patch_size))
            tokens.append(quantizer.patchify(bits.float(), patch_size) > 0.5)
            canvas = quantizer.accumulate(canvas, bits)
        losses = []
        for drop in (False, True):
            with torch.no_grad():
                logits = pipeline.transformer(
                    schedule, torch.cat(inputs, 1), source_BChw=source, text_BTF=text, text_mask_BT=mask,
                    drop_text_B=torch.tensor([drop]),
                )  # fmt: skip
            losses.append(bit_losses(logits, torch.cat(tokens, 1)).double().sum().item())
        assert evidence == pytest.approx((losses[1] - losses[0]) / schedule.offsets[-1], abs=1e-5)


def test_evidence_tells_edits_that_followed_the_instruction_from_those_that_did_not(pipeline, picture):
    """Bits drawn with the instruction are likelier with it, bits drawn without it (guidance 0) without it.

    In expectation these are two Kullback-Leibler divergences, one with its sign turned.
    """
    requests = [EditRequest(picture, "make it red", seed) for seed in range(4)]
    means = [
        np.mean(instruction_evidence(pipeline, apply_edits(pipeline, requests, Settings(scale, 1.0, preserve="off"))))
        for scale in (1.0, 0.0, 3.0)
    ]
    assert means[1] < 0 < means[0] < means[2]  # and guidance strengthens it


def _planted(result, changed: np.ndarray, stray: float | None = None):
    """The result, said to have changed there."""
    return replace(result, change_map=replace(result.change_map, hard_HW=changed, stray=stray))


def test_stray_is_what_the_majority_did_not_change(results):
    shape = results[0].change_map.hard_HW.shape
    wanted = np.zeros(shape, bool)
    wanted[:10] = True
    wild = wanted.copy()
    wild[-20:] = True
    planted = [_planted(results[0], wanted), _planted(results[1], wild), _planted(results[2], wanted)]
    assert stray_changes(planted) == [0.0, pytest.approx(20 / shape[0]), 0.0]
    assert stray_changes(planted[:2]) == [0.0, 0.0]
    assert stray_changes([replace(result, change_map=None) for result in results]) == [0.0] * 3
    masked = [_planted(result, wild, share) for result, share in zip(results, (0.1, 0.0, 0.3), strict=True)]
    assert stray_changes(masked) == [0.1, 0.0, 0.3]


def test_the_better_of_planted_candidates_wins(results):
    shape = results[0].change_map.hard_HW.shape
    calm, wild = np.zeros(shape, bool), np.ones(shape, bool)
    # Equal instruction scores: the one that changed least astray.
    planted = [_planted(results[0], wild, 0.5), _planted(results[1], calm, 0.01), _planted(results[2], calm, 0.2)]
    assert [c.result.seed for c in rank(planted, [1.0, 1.0, 1.0])] == [5, 6, 4]
    # Equal strays: the best score.
    planted = [_planted(result, calm, 0.0) for result in results]
    assert [c.result.seed for c in rank(planted, [1.0, 3.0, 2.0])] == [5, 6, 4]
    # A score a little better does not make up for half the picture.
    planted = [_planted(results[0], wild, 0.5), _planted(results[1], calm, 0.0)]
    found = rank(planted, [2.0, 1.0])
    assert found[0].result.seed == 5 and found[1].value == pytest.approx(1 - STRAY_WEIGHT * 0.5)
    # All equal: in the order of the seeds.
    assert [c.result.seed for c in rank(results[:1] * 2, [1.0, 1.0])] == [4, 4]


def test_a_scorer_of_ones_own_and_a_mask(pipeline, picture):
    mask = box_mask((10, 10, 30, 30), picture.size)
    settings = Settings(guidance_scale=1)

    def odd_first(_, results):
        return [result.seed % 2 for result in results]

    found = best_of(
        pipeline, picture, "x", 2, seed=2**63 - 1, settings=settings, mask=mask, scorer=lambda p, r: odd_first(p, r)
    )
    assert {candidate.result.seed for candidate in found} == {2**63 - 1, 0}
    assert {candidate.instruction_score for candidate in found} == {0.0, 1.0}
    for candidate in found:
        assert candidate.stray == candidate.result.change_map.stray
        outside = np.asarray(mask) == 0
        assert (np.asarray(candidate.result.image)[outside] == np.asarray(picture)[outside]).all()


@pytest.mark.parametrize("settings", [Settings(temperature=0), Settings(top_p=0.5)])
def test_settings_that_leave_nothing_to_chance_are_refused(settings, pipeline, picture):
    with pytest.raises(ValueError, match="makes one edit several times"):
        best_of(pipeline, picture, "blur", 2, seed=1, settings=settings)
    assert len(best_of(pipeline, picture, "blur", 1, seed=1, settings=settings)) == 1


def test_impossible_numbers_are_refused(pipeline, picture):
    for count in (0, 65):
        with pytest.raises(ValueError, match=str(count)):
            best_of(pipeline, picture, "x", count)
    with pytest.raises(ValueError, match="-1"):
        best_of(pipeline, picture, "x", 2, seed=-1)
