"""The procedural world: every pair is possible, exact outside its mask, reproducible and honestly worded."""

import json
import pickle
import random
import re
import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from varedit.data.record import read_folder
from varedit.data.synthetic import Pair, World, grammar, phrases, tone, vocabulary, write_world
from varedit.data.synthetic import world as world_module
from varedit.data.synthetic.edits import RELATIONS, TYPICAL_SIGN_SIZE
from varedit.data.synthetic.more_phrases import more_phrases
from varedit.data.synthetic.scene import Item, Renderer
from varedit.data.synthetic.stage import OPEN_ORDER, SPOT_WORDS, TYPICAL_SIZE, at_spot
from varedit.scales import scale_schedule

COUNT = 260
NAMES = ("dog", "grapes", "apple", "owl", "car")  # "owl" is held out


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Cut-outs with names and photographs of two splits, drawn here: train ones are reddish, test ones bluish."""
    root = tmp_path_factory.mktemp("world")
    objects, photos = root / "objects", root / "photos"
    objects.mkdir()
    photos.mkdir()
    names = {}
    for number, name in enumerate(NAMES):
        image = Image.new("RGBA", (96, 80))
        draw = ImageDraw.Draw(image)
        draw.polygon(((10, 70), (30, 8), (88, 60)), fill=(230, 40 + 30 * number, 30, 255))
        draw.rectangle((34, 40, 60, 74), fill=(20, 60, 200, 255))
        image.save(objects / f"{name}.webp", lossless=True)
        names[f"{name}.webp"] = {"names": [name], "category": "Test", "licence": f"licence of {name}"}
    (objects / "names.json").write_text(json.dumps(names))
    lines = []
    for split, channel in (("train", 0), ("test", 2)):
        for number in range(3):
            pixels = np.random.default_rng(number).integers(0, 60, (150, 190, 3), np.uint8)
            pixels[..., channel] += 150
            Image.fromarray(pixels).save(photos / f"{split}-{number}.png")
            lines.append(json.dumps({"file": f"{split}-{number}.png", "split": split, "licence": "CC0"}))
    (photos / "index.jsonl").write_text("\n".join(lines))
    return objects, photos


@pytest.fixture(scope="module")
def train(folders: tuple[Path, Path]) -> World:
    return World(*folders, split="train", size=128)


@pytest.fixture(scope="module")
def pairs(train: World) -> list[Pair]:
    return [train.pair(5, index) for index in range(COUNT)]


@pytest.fixture(scope="module")
def test_pairs(folders: tuple[Path, Path]) -> list[Pair]:
    world = World(*folders, split="test", size=128)
    return [world.pair(6, index) for index in range(COUNT)]


def same(a: Pair, b: Pair) -> bool:
    values = [(getattr(a, entry.name), getattr(b, entry.name)) for entry in fields(Pair)]
    return all(np.array_equal(x, y) if isinstance(x, np.ndarray) else x == y for x, y in values)


def objects_of(graph: dict) -> tuple[Item, ...]:
    return tuple(Item(**entry) for entry in graph["objects"])


def test_a_pair_depends_on_its_seed_and_index_alone(folders: tuple[Path, Path], pairs: list[Pair]) -> None:
    other = World(*folders, split="train", size=128)
    for index in (40, 3, 17, 3):
        assert same(other.pair(5, index), pairs[index])
    assert not same(other.pair(6, 3), pairs[3])
    assert not same(other.pair(5, 4), pairs[3])


def test_a_world_travels_to_a_worker_process(train: World, pairs: list[Pair]) -> None:
    assert same(pickle.loads(pickle.dumps(train)).pair(5, 8), pairs[8])


def test_pictures_have_the_promised_form(pairs: list[Pair]) -> None:
    for pair in pairs:
        for picture in (pair.source, pair.target):
            assert picture.shape == (128, 128, 3)
            assert picture.dtype == np.uint8
        assert pair.mask.shape == (128, 128)
        assert pair.mask.dtype == bool
        assert pair.instruction == pair.instructions[0]
        assert pair.edit_type in world_module.WEIGHTS
        json.dumps([pair.scene, pair.target_scene])


def test_the_target_equals_the_source_outside_the_mask_and_differs_inside(
    pairs: list[Pair], test_pairs: list[Pair]
) -> None:
    for pair in (*pairs, *test_pairs):
        assert np.array_equal(pair.source[~pair.mask], pair.target[~pair.mask])
        change = np.abs(pair.source.astype(int) - pair.target).max(-1)[pair.mask].mean()
        least = world_module.MIN_GLOBAL_CHANGE if pair.mask.all() else world_module.LEAST.get(pair.edit_type, 18.0)
        assert change >= least, pair.instruction


def test_every_edit_type_comes_up(pairs: list[Pair], test_pairs: list[Pair]) -> None:
    assert {pair.edit_type for pair in (*pairs, *test_pairs)} == set(world_module.WEIGHTS)
    tones = [pair for pair in pairs if pair.edit_type == "tone"]
    assert 0.2 < len(tones) / COUNT < 0.35
    assert sum(not pair.scene["objects"] for pair in tones) > len(tones) / 2


@pytest.mark.parametrize("ratio", [0.5, 0.666, 1.5, 3.0])
def test_pictures_have_exactly_the_size_of_the_template(folders: tuple[Path, Path], ratio: float) -> None:
    world = World(*folders, size=128, height_over_width=ratio)
    for index in range(25):
        pair = world.pair(1, index)
        assert pair.mask.shape == scale_schedule(128, ratio).image_hw
        assert np.array_equal(pair.source[~pair.mask], pair.target[~pair.mask])


def test_scenes_can_be_drawn_from_their_graphs_at_any_size(
    folders: tuple[Path, Path], train: World, pairs: list[Pair]
) -> None:
    small, large = train.renderer, Renderer(*folders, "train", 256, 256)
    for pair in pairs[:60]:
        for graph, picture in ((pair.scene, pair.source), (pair.target_scene, pair.target)):
            scene = world_module.Scene(graph["background"], objects_of(graph), tuple(graph["filters"]))
            assert np.array_equal(small.render(scene), picture)
        assert large.render(scene).shape == (256, 256, 3)


def test_objects_are_large_enough_inside_the_picture_and_apart(
    train: World, pairs: list[Pair], test_pairs: list[Pair]
) -> None:
    renderer = train.renderer
    for pair in (*pairs, *test_pairs):
        for graph in (pair.scene, pair.target_scene):
            items = objects_of(graph)
            for number, item in enumerate(items):
                top, left, height, width = renderer.box(item)
                assert min(top, left) >= 0
                assert max(top + height, left + width) <= 128
                assert max(height, width) >= 0.18 * 128
                assert renderer.apart(item, items[:number])


def test_source_and_target_graphs_differ_by_what_was_done(pairs: list[Pair]) -> None:
    for pair in pairs:
        before, after = pair.scene["objects"], pair.target_scene["objects"]
        (edit, *more) = pair.target_scene["edit"]
        if more:
            assert pair.edit_type == "composition"
            continue
        if edit["op"] == "add":
            assert after[:-1] == before
        elif edit["op"] == "remove":
            number = edit["object"]
            assert after == ([] if number == "all" else before[:number] + before[number + 1 :])
        elif edit["op"] in ("recolour", "material", "move", "resize", "rotate"):
            number = edit["object"]
            changed = {key for key in after[number] if after[number][key] != before[number].get(key)}
            allowed = {"move": {"x", "y"}, "resize": {"size"}, "rotate": {"angle", "flip"}, "recolour": {"colour"}}
            assert changed <= allowed.get(edit["op"], {"material"})
            assert changed
            assert [x for i, x in enumerate(after) if i != number] == [x for i, x in enumerate(before) if i != number]
        elif edit["op"] == "background":
            assert before == after
            assert pair.scene["background"] != pair.target_scene["background"]
        elif edit["op"] in ("tone", "style", "weather"):
            assert before == after
            assert [spec["name"] for spec in pair.target_scene["filters"]] == [edit["name"]]


def test_edits_of_the_whole_picture_are_what_they_say() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)
    image = Image.fromarray(pixels)

    def done(name: str, **more: str) -> np.ndarray:
        return np.asarray(tone.apply(name, image, **more)).astype(int)

    assert np.array_equal(done("mirror"), pixels[:, ::-1])
    assert np.array_equal(done("upside_down"), pixels[::-1])
    assert np.array_equal(done("invert"), 255 - pixels.astype(int))
    grey = done("grayscale")
    assert np.array_equal(grey[..., 0], grey[..., 1]) and np.array_equal(grey[..., 0], grey[..., 2])
    assert done("slightly_brighter").mean() > pixels.mean() > done("slightly_darker").mean()
    assert done("brighter").mean() > done("slightly_brighter").mean()
    assert done("darker").mean() < done("slightly_darker").mean()
    assert done("warmer")[..., 0].mean() > done("warmer")[..., 2].mean()
    assert done("colder")[..., 0].mean() < done("colder")[..., 2].mean()
    assert done("more_contrast").std() > pixels.std() > done("less_contrast").std()
    assert done("tint", colour="green")[..., 1].mean() > done("tint", colour="green")[..., 0].mean()
    assert set(np.unique(done("posterize"))) <= {0, 85, 170, 255}
    for name in (*tone.TONES, *tone.STYLES, *tone.WEATHERS):
        assert tone.apply(name, image, "blue", 3).size == image.size
        assert tone.describe(name, "blue")


def test_instructions_are_grammatical(pairs: list[Pair], test_pairs: list[Pair]) -> None:
    for pair in (*pairs, *test_pairs):
        assert len(set(pair.instructions)) == len(pair.instructions)
        for text in (*pair.instructions, pair.source_caption, pair.target_caption):
            assert not re.search(r"[\[\]{}|]|  |^\s|\s$", text), text
            assert not re.search(r"\ba [aeio]\w", text, re.IGNORECASE), text
            assert not re.search(r"\ban [bcdfgjklmpqrtvwyz]\w", text, re.IGNORECASE), text
            assert not re.search(r"\b(a|an) (some|the|grapes)\b", text, re.IGNORECASE), text
            assert not re.search(r"\b(\w+) \1\b", text, re.IGNORECASE), text


@pytest.mark.parametrize(
    ("name", "phrase"),
    [("dog", "a dog"), ("orange", "an orange"), ("grapes", "some grapes"), ("glasses", "some glasses"),
     ("bus", "a bus"), ("broccoli", "some broccoli"), ("unicorn", "a unicorn"), ("hourglass", "an hourglass"),
     ("UFO", "a UFO"), ("SUV", "an SUV"), ("red ball", "a red ball"), ("orange cone", "an orange cone")],
)  # fmt: skip
def test_articles(name: str, phrase: str) -> None:
    assert vocabulary.with_article(name) == phrase


def test_a_reference_fits_one_object_only(pairs: list[Pair], test_pairs: list[Pair]) -> None:
    twins = 0
    for pair in (*pairs, *test_pairs):
        items = objects_of(pair.scene)
        said = [set(grammar.references(items, index)) for index in range(len(items))]
        twins += len({item.name for item in items}) < len(items)
        for index, words in enumerate(said):
            assert not words & set().union(*said[:index], *said[index + 1 :])
    assert twins > 5


def test_words_for_size_and_place_are_true() -> None:
    left = Item("sprite", "dog", x=0.2, y=0.5, size=0.2, file="a")
    right = Item("sprite", "dog", x=0.8, y=0.5, size=0.4, file="a")
    assert "the smaller dog on the left" in grammar.references((left, right), 0)
    assert {"the bigger dog", "the dog on the right"} <= set(grammar.references((left, right), 1))
    assert grammar.references((left, left), 0) == []
    red, blue = (Item("primitive", "ball", x=x, colour=c, material="matte") for x, c in ((0.2, "red"), (0.3, "blue")))
    assert set(grammar.references((red, blue), 0)) == {"the red ball"}


def test_phrasings_are_many_and_the_held_out_ones_apart() -> None:
    for name in (*tone.TONES, *tone.STYLES, *tone.WEATHERS):
        assert len(phrases.PHRASES[name][0]) >= 12, name
    for key, (seen, held_out) in phrases.PHRASES.items():
        assert seen and held_out, key
        assert not set(seen) & set(held_out), key
        if key == "recolour_sprite":  # that of "recolour", less what names the old colour
            continue
        more = more_phrases()[key]
        assert not {*seen, *held_out} & set(more) and len(set(more)) == len(more), key
        slots = set(re.findall(r"{\w+}", " ".join((*seen, *held_out)))) | {"{pic}", "{kind}"}
        assert set(re.findall(r"{\w+}", " ".join(more))) <= slots, key
    assert set(more_phrases()) == set(phrases.PHRASES)


def test_no_further_phrasing_says_a_held_out_one_with_words_around_it() -> None:
    common = set("a all an and by for in into it kind make of on pic please ref some that the this to up with".split())

    def stem(word: str) -> str:
        return re.sub(r"(?<=...)(wards|ing|ed|es|er|s|e)$", "", word)

    def words(template: str) -> set[str]:
        found = re.findall(r"[a-z]+", re.sub(r"{\w+}", "", template.lower()))
        return {stem(word) for word in found if word not in common}

    assert words("topple {ref} leftwards") == words("toppled to the left")
    for key, (_, held_out) in phrases.PHRASES.items():
        for template in held_out:
            telling = words(template)
            if telling and telling != {"light"}:  # "light it up": without light hardly a word is left for brighter
                assert not [more for more in more_phrases()[key] if telling <= words(more)], template


def test_training_moves_to_a_side_along_one_direction(folders: tuple[Path, Path]) -> None:
    world = World(*folders, "train", 128, weights={"move": 1})
    sides = set()
    for index in range(120):
        pair = world.pair(3, index)
        operation = pair.target_scene["edit"][0]
        if operation.get("spot") in ("left", "right", "top", "bottom"):
            sides.add(operation["spot"])
            before, after = (graph["objects"][operation["object"]] for graph in (pair.scene, pair.target_scene))
            kept = "y" if operation["spot"] in ("left", "right") else "x"
            assert after[kept] == before[kept] and "middle" not in pair.instruction
    assert len(sides) == 4


def test_training_puts_in_patterns_of_one_count(folders: tuple[Path, Path]) -> None:
    world = World(*folders, "train", 128, weights={"background": 1})
    specs = [world.pair(3, index).target_scene["background"] for index in range(60)]
    assert {spec["count"] for spec in specs if spec["kind"] == "pattern"} == {5}


def test_a_bare_name_is_for_the_only_one_of_its_kind() -> None:
    rng = random.Random(0)
    for ref, both in (("the banana", True), ("the banana on the left", False)):
        said = {grammar.clause(rng, "smaller", {"ref": ref, "bare": "banana"}, photo=False, held_out=False, more=True)
                for _ in range(600)}  # fmt: skip
        assert any("banana" in text and ref not in text for text in said) == both


def test_objects_of_ones_own_names_are_drawn(folders: tuple[Path, Path], tmp_path: Path) -> None:
    names = json.loads((folders[0] / "names.json").read_text())
    file = next(iter(names))
    shutil.copy(folders[0] / file, tmp_path / file)
    for name, drawn in (("red mug", True), ("owl", False)):
        (tmp_path / "names.json").write_text(json.dumps({file: {**names[file], "names": [name]}}))
        if drawn:
            world = World(tmp_path, None, "train", 128, weights={"add": 1})
            assert any(name in world.pair(0, index).instruction for index in range(20))
        else:  # held out
            with pytest.raises(ValueError, match="held out"):
                World(tmp_path, None, "train", 128)
            assert World(tmp_path, None, "test", 128).pair(0, 0)


def test_an_added_objects_place_is_named_or_not(folders: tuple[Path, Path]) -> None:
    world = World(*folders, "test", 128, weights={"add": 1})
    places = [words for spot in SPOT_WORDS.values() for words in spot] + [words for words, _, _ in RELATIONS]
    named = []
    for index in range(60):
        pair = world.pair(3, index)
        named.append(pair.target_scene["edit"][0]["place_named"])
        assert named[-1] == any(words in pair.instruction.lower() for words in places), pair.instruction
    assert 10 < sum(named) < 50


def test_training_decides_what_an_added_objects_instruction_leaves_open(folders: tuple[Path, Path]) -> None:
    world = World(*folders, "train", 128, weights={"add": 1})
    renderer = Renderer(*folders, "train", 128, 128)
    pairs = [world.pair(3, index) for index in range(40)]
    open_pairs = [pair for pair in pairs if not pair.target_scene["edit"][0]["place_named"]]
    assert len(open_pairs) > 8
    for pair in open_pairs:
        *before, new = objects_of(pair.target_scene)
        background = renderer.background(pair.scene["background"])
        free = [spot for spot in OPEN_ORDER if renderer.fits(at_spot(renderer, new, spot), tuple(before), background)]
        assert pair.target_scene["edit"][0]["spot"] == free[0] and new == at_spot(renderer, new, free[0])
    assert {pair.target_scene["edit"][0]["spot"] for pair in open_pairs} > {"center"}
    added = [objects_of(pair.target_scene)[-1] for pair in pairs]
    assert {(item.size, item.shade, item.flip) for item in added} == {(TYPICAL_SIZE, 0, False)}
    assert len({(item.name, item.file) for item in added}) == len({item.name for item in added})


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_material_edit_asks_for_nothing_hidden(folders: tuple[Path, Path], split: str) -> None:
    """What colour a wooden cube has as glass, or what a metal one becomes with spots, no picture shows."""
    world = World(*folders, split, 128, weights={"material": 1})
    edits = [world.pair(3, index).target_scene["edit"][0] for index in range(40)]
    assert {edit["from"] for edit in edits} >= {"matte", "metal"} and "wood" not in {edit["from"] for edit in edits}
    assert {edit["from"] for edit in edits if edit["to"] in ("striped", "spotted")} == {"matte"}


def test_joined_clauses_speak_of_their_own_edit_only(folders: tuple[Path, Path]) -> None:
    world = World(*folders, "train", 128, weights={"composition": 1})
    for index in range(60):
        for text in world.pair(4, index).instructions:
            assert not re.search(r"\b(it|the rest|everything else|nothing else)\b", text), text


def test_training_names_the_colour_of_an_added_sign_or_takes_white(folders: tuple[Path, Path]) -> None:
    world, named = World(*folders, "train", 128, weights={"text": 1}), []
    for index in range(80):
        pair = world.pair(5, index)
        if len(pair.target_scene["objects"]) > len(pair.scene["objects"]):
            sign = objects_of(pair.target_scene)[-1]
            named.append(any(word in vocabulary.COLOURS for word in re.findall(r"[a-z]+", pair.instruction)))
            assert sign.size == TYPICAL_SIGN_SIZE and (named[-1] or sign.colour == "white"), pair.instruction
            assert not named[-1] or sign.colour in pair.instruction
    assert 0 < sum(named) < len(named)


def test_further_phrasings_are_for_training_alone(folders: tuple[Path, Path]) -> None:
    def said(split: str, further: dict[str, tuple[str, ...]]) -> list[str]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(grammar, "more_phrases", lambda: further)
            world = World(*folders, split, 128)
            return [world.pair(4, index).instruction for index in range(40)]

    none = dict.fromkeys(more_phrases(), ())
    assert said("test", more_phrases()) == said("test", none)
    assert said("train", more_phrases()) != said("train", none)


def test_training_pairs_use_nothing_held_out(pairs: list[Pair]) -> None:
    for pair in pairs:
        assert pair.held_out == ()
        for graph in (pair.scene, pair.target_scene):
            for item in objects_of(graph):
                if item.kind == "sprite":
                    assert not vocabulary.held_out_name(item.name)
                elif item.kind != "sign":
                    assert not vocabulary.held_out_combination(item.colour, item.name)
        if pair.edit_type == "composition":
            first, second = (edit["op"] for edit in pair.target_scene["edit"])
            assert (first, second) not in vocabulary.HELD_OUT_PAIRS


def test_test_pairs_say_what_is_held_out(test_pairs: list[Pair]) -> None:
    assert 0.3 < sum(pair.held_out == ("phrasing",) for pair in test_pairs) / COUNT < 0.7
    assert sum(pair.held_out == () for pair in test_pairs) > 0.1 * COUNT
    for pair in test_pairs:
        items = {item for graph in (pair.scene, pair.target_scene) for item in objects_of(graph)}
        unseen = any(item.kind == "sprite" and vocabulary.held_out_name(item.name) for item in items)
        assert ("object" in pair.held_out) == unseen
    assert any("object" in pair.held_out for pair in test_pairs)
    assert any("combination" in pair.held_out for pair in test_pairs)


def test_each_split_reads_its_own_photographs(pairs: list[Pair], test_pairs: list[Pair]) -> None:
    for split, found in (("train", pairs), ("test", test_pairs)):
        backs = [pair.scene["background"] for pair in found if pair.scene["background"]["kind"] == "photo"]
        assert len(backs) > COUNT / 4
        assert all(back["file"].startswith(split) for back in backs)


def test_without_photographs_the_backgrounds_are_drawn(folders: tuple[Path, Path]) -> None:
    world = World(folders[0], None, size=128)
    found = [world.pair(2, index) for index in range(40)]
    assert {pair.scene["background"]["kind"] for pair in found} >= {"plain", "landscape"}
    assert all(pair.scene["background"]["kind"] != "photo" for pair in found)


def test_without_a_folder_of_objects_there_is_always_something_to_draw() -> None:
    world = World(size=128)  # the emoji font if the system has it, else shapes alone
    found = [world.pair(2, index) for index in range(60)]
    assert any(item.kind == "shape" for pair in found for item in objects_of(pair.scene))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"split": "validation"}, "use 'train' or 'test'"), ({"size": 8}, "not a size class"),
     ({"height_over_width": 9.0}, "not a template"), ({"objects": Path("nowhere")}, "names.json"),
     ({"photos": Path("nowhere")}, "index.jsonl")],
)  # fmt: skip
def test_what_cannot_be_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        World(**arguments)


@pytest.mark.parametrize("content", ["", "[", "3", "{}", '{"a.png": 3}', '{"a.png": {"names": []}}', "[{}]"])
def test_folders_with_a_damaged_index_are_refused(content: str, tmp_path: Path) -> None:
    for name, options in (("names.json", {"objects": tmp_path}), ("index.jsonl", {"photos": tmp_path})):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=rf"folder {tmp_path}.* (names|index)\.json") as error:
            World(**options)
        assert "\n" not in str(error.value)


def test_a_folder_of_the_world_holds_its_pairs(folders: tuple[Path, Path], pairs: list[Pair], tmp_path: Path) -> None:
    objects, photos = folders
    seen: list[int] = []
    assert write_world(tmp_path, 12, size=128, seed=5, objects=objects, photos=photos, on_pair=seen.append) == 12
    assert seen == list(range(1, 13))
    for pair, record in zip(pairs, read_folder(tmp_path)):
        source, target, mask = record.arrays()
        assert np.array_equal(source, pair.source)
        assert np.array_equal(target, pair.target)
        assert np.array_equal(mask, pair.mask)
        assert record.instructions == pair.instructions
        assert record.extra["target_scene"] == json.loads(json.dumps(pair.target_scene))
        assert record.licence
    with pytest.raises(ValueError, match="use at least 1"):
        write_world(tmp_path / "none", 0)


def test_real_cutouts_and_photographs(shared_dir: Path) -> None:
    objects, photos = shared_dir / "data" / "objects", shared_dir / "data" / "photos"
    if not (objects.is_dir() and photos.is_dir()):
        pytest.skip("needs folders of cut-outs and photographs that are not in the repository")
    world = World(objects, photos, split="test", size=128)
    tested = {json.loads(line)["file"] for line in (photos / "index.jsonl").open() if '"split": "test"' in line}
    for index in range(60):
        pair = world.pair(0, index)
        assert np.array_equal(pair.source[~pair.mask], pair.target[~pair.mask])
        back = pair.scene["background"]
        assert back["kind"] != "photo" or back["file"] in tested


def test_weights_choose_the_edit_types():
    world = World(weights={"recolour": 1, "remove": 3})
    assert {world.pair(0, index).edit_type for index in range(12)} == {"recolour", "remove"}
    with pytest.raises(ValueError, match="'recolor' is unknown"):
        World(weights={"recolor": 1})
