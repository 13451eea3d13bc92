"""Held-out pairs, paraphrases, gallery and sweep: what they ask, choose and count."""

import random
import re
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from varedit.data.synthetic import World, grammar
from varedit.data.synthetic.more_phrases import more_phrases
from varedit.data.synthetic.phrases import PHOTO, PHOTO_KIND, PHRASES, PIC
from varedit.evaluation.benchmarks import load
from varedit.evaluation.held_out import HeldOut, objects_of
from varedit.image_processor import to_pil
from varedit.quantizer import decode_bits, encode_bits
from varedit.scales import scale_schedule
from varedit.testing import tiny_pipeline
from varedit.training.objective import objective

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))
import bit_loss  # noqa: E402
import gallery  # noqa: E402
import image_tokenizer as image_tokenizer_script  # noqa: E402
import lock  # noqa: E402
import paraphrases  # noqa: E402
import sweep  # noqa: E402


@pytest.fixture(scope="module")
def held_out() -> HeldOut:
    return HeldOut(seed=2024)


# -- held-out pairs


def test_answers_are_those_of_the_benchmark(held_out):
    for case in load("procedural", None, size=128, limit=30).cases:
        pair, theirs = held_out.pair(int(case.key)), case.answers()
        assert np.array_equal(theirs[0].target, pair.target) and np.array_equal(theirs[0].mask, pair.mask)
        assert all(map(np.array_equal, held_out.regions(pair), theirs[0].regions))
        assert len(held_out.answers(pair)) == len(theirs)


def test_an_object_added_wherever_it_fits_is_right_where_no_place_is_named(held_out):
    counts = {True: [], False: []}
    for index in held_out.judgeable():
        pair = held_out.pair(index)
        if pair.edit_type != "add":
            continue
        answers, named = held_out.answers(pair), pair.target_scene["edit"][0]["place_named"]
        counts[named].append(len(answers))
        for answer in (answers[0], *answers[1::40]):
            verdict = held_out.check(pair, answer.target)
            assert verdict.success and verdict.closer and verdict.half and verdict.stray == 0
            changed = (answer.target != pair.source).any(-1)
            assert changed.any() and not (changed & ~answer.mask).any()
        assert held_out.check(pair, pair.source).completeness == 0
        apart = [other for other in answers if not (other.mask & answers[0].mask).any()]
        for other in apart[::40]:
            twice = np.where(answers[0].mask[..., None], answers[0].target, other.target)
            assert not held_out.check(pair, twice).success, "two objects are one too many"
        if min(map(len, counts.values())) >= 2:
            break
    assert set(counts[True]) == {1} and max(counts[False]) > 9


def test_the_verdict_is_the_best_one_of_all_answers(held_out):
    pairs = (pair for pair in map(held_out.pair, held_out.judgeable()) if pair.edit_type == "add")
    pair, answers = next((pair, found) for pair in pairs if len(found := held_out.answers(pair)) > 20)
    noise = np.random.default_rng(0).normal(0, 12, pair.source.shape)
    for answer in (answers[0], answers[7]):
        for share in (0.3, 0.55, 1):
            blend = pair.source + share * (answer.target.astype(float) - pair.source) + noise
            result = blend.clip(0, 255).astype(np.uint8)
            every = [one.check(pair.source, result) for one in answers]
            best = max(every, key=lambda v: (v.success, v.half, v.closer, v.completeness))
            assert held_out.check(pair, result) == best and best.closer == (share > 0.5)


def found(held_out, wanted, limit=2000):
    """The first judgeable pair of which `wanted` is true."""
    return next(pair for pair in map(held_out.pair, islice(held_out.judgeable(), limit)) if wanted(pair))


def test_an_object_moved_to_a_side_may_keep_its_place_along_it(held_out):
    def wanted(pair):
        spot = pair.target_scene["edit"][0].get("spot")
        return (
            pair.edit_type == "move" and spot in ("left", "right", "top", "bottom") and len(held_out.answers(pair)) > 1
        )

    pair = found(held_out, wanted)
    operation = pair.target_scene["edit"][0]
    before, after = (graph["objects"][operation["object"]] for graph in (pair.scene, pair.target_scene))
    own, straight = held_out.answers(pair)
    assert before["x"] != after["x"] and before["y"] != after["y"]
    assert held_out.check(pair, straight.target).success and not straight.check(pair.source, own.target).success


def test_a_pattern_may_have_any_number_of_periods_and_begin_with_either_colour(held_out):
    pair = found(held_out, lambda pair: pair.edit_type == "background" and "count" in pair.target_scene["background"])
    answers = held_out.answers(pair)
    assert len(answers) == 8 and len({one.target.tobytes() for one in answers}) == 8
    assert all(held_out.check(pair, one.target).success for one in answers)


def test_what_stands_on_a_new_background_has_to_stay(held_out):
    wiped = 0
    for pair in map(held_out.pair, islice(held_out.judgeable(), 200)):
        if pair.edit_type != "background":
            continue
        (own, *_) = held_out.answers(pair)
        assert len(own.kept) == len(pair.scene["objects"]) and own.check(pair.source, pair.target).success
        for place in own.kept:
            result = np.where(place[..., None], own.bare, pair.target)
            assert not held_out.check(pair, result).success
            wiped += own.check(pair.source, result).stray == 0  # thin things, which nothing else would miss
    assert wiped


def test_text_that_is_taken_away_may_leave_its_sign(held_out):
    world = HeldOut(seed=2024)
    for said in (False, True):
        wanted = (
            pair for pair in map(world.pair, world.judgeable())
            if pair.edit_type == "text" and pair.target_scene["edit"][0]["to"] is None
            and ("sign" in pair.instruction.lower()) == said
        )  # fmt: skip
        pair = next(wanted)
        answers = world.answers(pair)
        assert len(answers) == 2 - said and world.check(pair, answers[-1].target).success
        if not said:
            changed = (answers[1].target != pair.source).any(-1)
            assert 0 < changed.sum() < (answers[0].target != pair.source).any(-1).sum()


def test_what_one_of_two_edits_leaves_open_is_open(held_out):
    def wanted(pair):
        operations = pair.target_scene["edit"]
        return len(operations) == 2 and any(one["op"] == "add" and not one["place_named"] for one in operations)

    pair = found(held_out, wanted, 2000)
    answers = held_out.answers(pair)
    assert len(answers) > 3
    for answer in answers[:: len(answers) // 3]:
        changed = (answer.target != pair.source).any(-1)
        assert held_out.check(pair, answer.target).success and not (changed & ~answer.mask).any()


def test_the_answer_succeeds_and_the_source_does_not(held_out):
    for index in islice(held_out.judgeable(), 40):
        pair = held_out.pair(index)
        assert held_out.check(pair, pair.target).success
        assert held_out.check(pair, pair.source).completeness == 0


def test_indices_are_a_function_of_the_stream(held_out):
    first = list(islice(held_out.judgeable(), 8))
    assert list(islice(held_out.judgeable(first[3]), 5)) == first[3:]
    assert len(first) == len(set(first))


# -- the loss on fixed pairs


def test_the_loss_of_every_pair_is_its_own():
    pipeline, world = tiny_pipeline(max_text_tokens=256), World(size=128)
    pairs = [world.pair(5, index) for index in range(3)]
    together = bit_loss.losses(pipeline, [pairs], 4.0)
    assert together == pytest.approx(bit_loss.losses(pipeline, [[pair] for pair in pairs], 4.0), abs=1e-5)
    part = bit_loss.encode(pipeline, pairs, 4.0)
    logits = pipeline.transformer(
        part.schedule, part.forced.inputs_BLC, source_BChw=part.source_BChw,
        text_BTF=part.text[0], text_mask_BT=part.text[1],
    )  # fmt: skip
    of_training = objective(logits, part.forced.bits_BLC, part.schedule, part.weights_BL).item()
    assert np.mean(together) == pytest.approx(of_training, abs=1e-5) and np.ptp(together) > 1e-3


def test_losses_are_compared_with_the_first_model(tmp_path):
    pipeline = tiny_pipeline(max_text_tokens=256)  # it reads bytes
    for name in ("one", "other"):
        pipeline.save_pretrained(tmp_path / name)
        torch.nn.init.zeros_(pipeline.transformer.head.weight)
        torch.nn.init.zeros_(pipeline.transformer.head.bias)
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    bit_loss.main([one, one, other], number=4, output=tmp_path / "page.md")
    (last,) = (line for line in (tmp_path / "page.md").read_text().splitlines() if line.startswith("| all |"))
    _, _, pairs, first, same, even, _ = (cell.strip() for cell in last.split("|"))
    assert pairs == "4" and same == f"{first} (+0.0000; +0.0000 to +0.0000)"
    assert even.startswith("0.6931 ("), "log 2 a bit: neither value is likelier"


def test_losses_of_two_image_tokenizers_do_not_compare(tmp_path):
    for name in ("one", "other"):
        pipeline = tiny_pipeline(max_text_tokens=256)  # it reads bytes
        if name == "other":
            torch.nn.init.zeros_(next(pipeline.image_tokenizer.parameters()))
        pipeline.save_pretrained(tmp_path / name)
    with pytest.raises(bit_loss.typer.BadParameter, match="other has other bits than .*one"):
        bit_loss.main([str(tmp_path / "one"), str(tmp_path / "other")], number=4)


# -- paraphrases

TEXTS = paraphrases.read_paraphrases()


def test_paraphrases_cover_every_kind_of_edit():
    assert sum(map(len, TEXTS.values())) >= 60
    assert set(TEXTS) == (set(PHRASES) - {"recolour_sprite"}) | {"composition"}
    for kind, texts in TEXTS.items():
        assert len(texts) >= 2 and len({text.lower() for text in texts}) == len(texts), kind


def patterns(key: str) -> list[re.Pattern]:
    """Expressions that match all that the grammar can say, in any of its dresses; a slot matches a slot."""
    found = []
    for template in (*PHRASES[key][0], *PHRASES[key][1], *more_phrases()[key]):
        text = template.replace("{pic}", f"[{PIC[1:-1]}|{PHOTO[1:-1]}]").replace("{kind}", PHOTO_KIND)
        text = re.escape(text)
        previous = None
        while text != previous:  # innermost choices first
            previous = text
            text = re.sub(r"\\\[([^\[\]]*?)\\\]", lambda m: "(?:" + m[1].replace(r"\|", "|") + ")", text)
        text = re.sub(r"\\{\w+\\}", r"\\{\\w+\\}", text)
        found.append(
            re.compile(rf"(?:please |can you |could you (?:please )?)?{text}(?:, please)?[.?]?", re.IGNORECASE)
        )
    return found


def test_the_expressions_match_what_the_grammar_says():
    rng = random.Random(0)
    names = "ref colour old bare new where is objects back back_adj goal them they side its stuff stuff_adj quoted"
    slots = dict.fromkeys([*names.split(), "old_quoted"], "zzz")
    for key in PHRASES:
        for held in (False, True):
            said = grammar.dress(rng, grammar.clause(rng, key, slots, photo=held, held_out=held, more=not held))
            said = re.sub("zzz", "{thing}", said, flags=re.IGNORECASE)
            assert any(pattern.fullmatch(said) for pattern in patterns(key)), said


@pytest.mark.parametrize("key", sorted(PHRASES))
def test_no_paraphrase_is_one_of_the_grammar(key):
    for text in TEXTS["recolour" if key == "recolour_sprite" else key]:
        for pattern in patterns(key):
            assert not pattern.fullmatch(text), f"{text!r} is what the grammar says: {pattern.pattern}"


@pytest.fixture(scope="module")
def pairs():
    world = World(split="test", size=128)
    return [world.pair(6, index) for index in range(300)]


def test_paraphrases_name_what_is_asked(pairs):
    kinds = set()
    for number, pair in enumerate(pairs):
        edits = paraphrases.asked(pair)
        if edits is None:
            continue
        operations = pair.target_scene["edit"]
        assert len(edits) == len(operations)
        text = paraphrases.paraphrase(pair, TEXTS, random.Random(number))
        assert text == paraphrases.paraphrase(pair, TEXTS, random.Random(number))
        assert not re.search(r"[{}]|\ba [aeio]\w|\b(\w+) \1\b", text), text
        for edit, operation in zip(edits, operations):
            kinds.add(edit.kind)
            assert all(value in text or not value for value in edit.slots.values()), (text, edit)
            if operation["op"] == "recolour":
                assert edit.slots["colour"] == operation["to"]
            if operation["op"] == "replace":
                assert operation["to"] in edit.slots["thing"]
            if operation["op"] in ("add", "replace"):
                assert any(grammar.name_of(item) in edit.slots["thing"] for item in objects_of(pair)[1])
            if "object" in edit.slots:
                items, _ = objects_of(pair)
                fitting = [i for i in range(len(items)) if edit.slots["object"] in grammar.references(items, i)]
                assert len(fitting) == 1
    assert len(kinds) > 35


def test_most_pairs_can_be_paraphrased(pairs):
    assert sum(paraphrases.asked(pair) is None for pair in pairs) < 0.02 * len(pairs)


def test_rates_and_report():
    assert paraphrases.rate([True] * 8 + [False] * 2) == "80.0 (49.0 to 94.3)"  # Wilson, 8 of 10
    rows = [
        {"type": "tone", "index": number, "grammar": {"success": True, "completeness": 1.0},
         "paraphrase": {"success": number < 5, "completeness": 0.5}} for number in range(10)
    ]  # fmt: skip
    text = paraphrases.report(rows, "a model")
    assert "| tone | 10 | 100.0 (72.2 to 100.0) | 50.0 (23.7 to 76.3) | 1.00 | 0.50 |" in text
    assert "Paraphrase less grammar: -50.0 points" in text


# -- gallery


def test_the_gallery_shows_every_kind(held_out):
    chosen = gallery.choose(held_out, with_photos=False, allowed=None)
    kinds = [held_out.pair(index).edit_type for index in chosen]
    assert len(chosen) == 40 == sum(map(sum, gallery.SHOWN.values()))
    assert {kind: kinds.count(kind) for kind in kinds} == {kind: sum(n) for kind, n in gallery.SHOWN.items()}
    assert chosen == gallery.choose(HeldOut(seed=2024), with_photos=False, allowed=None)


def test_the_committed_gallery_has_free_pictures_only():
    allowed = {*gallery.DRAWN, *gallery.PHOTOGRAPHS.values()}
    with gallery.free_photographs() as folder:
        held_out = HeldOut(None, folder, seed=gallery.SEED)
        chosen = gallery.choose(held_out, True, allowed)
        on_photos = [index for index in chosen if held_out.pair(index).scene["background"]["kind"] == "photo"]
        assert len(chosen) == 40 and len(on_photos) == sum(photos for photos, _ in gallery.SHOWN.values())
        used = {licence for index in chosen for licence in held_out.world.licences(held_out.pair(index))}
        assert used & set(gallery.PHOTOGRAPHS.values()) and used <= allowed


def test_sheet_and_page(held_out):
    pipeline = tiny_pipeline()
    indices = list(islice(held_out.judgeable(), 4))
    shown = gallery.edit(pipeline, held_out, indices)
    sheet = gallery.draw_sheet(shown)
    assert sheet.width > 1200 and sheet.height > 2 * 128
    # The first case's source stands in the sheet as it is.
    place = (gallery._MARGIN, gallery._MARGIN + gallery._LINE + gallery._NUM_LINES * gallery._LINE)
    box = (*place, place[0] + 128, place[1] + 128)
    assert np.array_equal(np.asarray(sheet.crop(box)), shown[0].pair.source)
    assert len(gallery.encode(sheet, 60_000)) <= 60_000
    with pytest.raises(ValueError, match="does not fit into 100 bytes"):
        gallery.encode(sheet, 100)
    text = gallery.page(shown, "a model", ["somebody"])
    assert all(case.pair.instruction in text for case in shown) and "- somebody" in text
    assert text.count("| yes |") + text.count("| no |") == 4


# -- sweep


def test_sweep_of_a_tiny_model(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    sweep.main(
        model=str(tmp_path / "model"), guidance_scales="1,3", temperatures="0,1", top_ps="1,0.9", count=3,
        batch_size=2, preserve="off", output=tmp_path / "sweep.md",
    )  # fmt: skip
    rows = re.findall(r"^\| (\S+) \| (\S+) \| (\S+) \| .*\|$", (tmp_path / "sweep.md").read_text(), re.MULTILINE)[2:]
    assert rows == [("1", "0", "1"), ("1", "1", "1"), ("1", "1", "0.9"), ("3", "0", "1"), ("3", "1", "1"),
                    ("3", "1", "0.9")]  # fmt: skip


def test_judging_does_not_depend_on_the_batch(held_out):
    from varedit.editing.edit import Settings

    pipeline, indices = tiny_pipeline(), list(islice(held_out.judgeable(), 3))
    settings = Settings(3.0, 0.5, 1.0)
    assert sweep.judge(pipeline, held_out, indices, settings, 3) == sweep.judge(
        pipeline, held_out, indices, settings, 1
    )


@pytest.mark.parametrize("value", ["-1", "nan"])
def test_settings_that_cannot_be_are_refused_before_a_model_loads(value):
    with pytest.raises(ValueError, match="temperature"):
        sweep.main(model="nowhere", temperatures=value)


def test_pictures_are_read_as_they_are():
    with gallery.free_photographs() as folder:
        for file in gallery.PHOTOGRAPHS:
            with Image.open(folder / file) as image:
                assert image.mode == "RGB" and min(image.size) >= 256


# -- the image tokenizer alone


def test_drawn_scenes_have_objects_and_no_photograph():
    world = World(None, None, "test", 128)
    first, second = islice(image_tokenizer_script.pictures(world, False, seed=3), 2)
    with_objects = [pair.source for pair in (world.pair(3, index) for index in range(20)) if pair.scene["objects"]]
    assert np.array_equal(first, with_objects[0]) and np.array_equal(second, with_objects[1])


def test_a_reconstruction_is_what_its_bits_decode_to():
    tokenizer, picture = tiny_pipeline().image_tokenizer, World(None, None, "test", 128).pair(3, 0).source
    result = image_tokenizer_script.reconstruct(tokenizer, picture, 128)
    with torch.no_grad():
        features = tokenizer.encode(torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1)
        schedule, patch_size = scale_schedule(128), tokenizer.config.patch_size
        bits, _ = encode_bits(features, schedule, patch_size)
        decoded = tokenizer.decode(decode_bits(bits, schedule, patch_size))
    assert np.array_equal(result, np.asarray(to_pil(decoded)[0]))


# -- edits in an area


def test_edits_in_an_area_are_right_inside_it_alone(held_out):
    for cases in (lock.whole_picture_cases(held_out), lock.object_cases(held_out)):
        for case in islice(cases, 5):
            source, area = np.asarray(case.request.image), np.asarray(case.request.mask) > 0
            assert case.answers and not case.check(case.request.image).closer
            for answer in case.answers:
                assert case.check(Image.fromarray(answer.target)).success
                assert np.array_equal(answer.target[~area], source[~area]) and not (answer.mask & ~area).any()
