"""Does the editor understand words that no grammar made? Held-out cases, in the grammar's words and in a person's.

    python benchmarks/paraphrases.py --objects DIR --photos DIR --count 300 --output benchmarks/results/paraphrases.md

paraphrases.jsonl holds instructions in the manner of people, written one by one, each bound to one kind of edit: its
slots ({object}, {colour}, {place} ...) are filled from the case, so that the exact checker knows the answer. Every case
is edited twice with the same seed: once as the procedural world words it, once as a person would.
"""

import json
import random
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image
from scipy.stats import binomtest

from varedit.data.synthetic import Pair, grammar, vocabulary
from varedit.data.synthetic.phrases import STUFF
from varedit.data.synthetic.scene import Item
from varedit.data.synthetic.stage import SPOT_WORDS
from varedit.durable import write_durably
from varedit.editing.edit import EditRequest, apply_edits
from varedit.evaluation.held_out import HeldOut, objects_of
from varedit.evaluation.scores import bootstrap
from varedit.pipeline import VAREditPipeline, load_pipeline

FILE = Path(__file__).with_name("paraphrases.jsonl")
SEED = 31
"""Of the stream of held-out pairs."""

PLACES = {
    "top left": "in the top-left bit", "top": "up top in the middle", "top right": "in the top-right bit",
    "left": "over on the left", "center": "right in the middle", "right": "over on the right",
    "bottom left": "down in the bottom-left", "bottom": "down at the bottom",
    "bottom right": "down in the bottom-right",
}  # fmt: skip
RELATIONS = {
    "to the left of": "just left of", "to the right of": "just right of", "above": "right above",
    "below": "right below", "under": "right under",
}  # fmt: skip
SIDES = {"left": "to the left", "right": "to the right", "up": "up", "down": "down"}
PATTERN = {"stripes": "stripes", "checks": "a checkerboard", "dots": "polka dots"}


def read_paraphrases(file: Path = FILE) -> dict[str, list[str]]:
    """Kind of edit -> the ways in which it is said."""
    found: dict[str, list[str]] = defaultdict(list)
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found[row["edit"]].append(row["text"])
    return dict(found)


# -- from a pair to kinds of edit and slots --


@dataclass(frozen=True)
class Asked:
    """One edit of a pair: its kind, a key of the paraphrases, and what fills the slots."""

    kind: str
    slots: dict[str, str]


def asked(pair: Pair) -> list[Asked] | None:
    """What a pair asks for, in order; None if an object cannot be named by words that fit it alone."""
    found = []
    for number, operation in enumerate(pair.target_scene["edit"]):
        kind = operation["op"]
        if kind in ("tone", "style", "weather"):
            found.append(Asked(operation["name"], {"colour": operation.get("colour", "")}))
            continue
        one = _LOCAL[kind](pair, number)
        if one is None:
            return None
        found.append(one)
    return found


def _reference(pair: Pair, number: int, field: str = "object") -> str | None:
    """Words for an object that fit it alone: those of the pair's own instruction where there are such."""
    operations, (items, _) = pair.target_scene["edit"], objects_of(pair)
    removed = [operation["object"] for operation in operations[:number] if operation["op"] == "remove"]
    index = operations[number][field]
    index += sum(place <= index for place in removed)  # its place in the source
    phrases = grammar.references(items, index) if index < len(items) else []
    said = [phrase for phrase in phrases if phrase.lower() in pair.instruction.lower()]
    return max(said or phrases, key=len, default=None)


def _made(pair: Pair, number: int) -> Item:
    """The object that an operation put into the picture."""
    operations, (_, items) = pair.target_scene["edit"], objects_of(pair)
    index = operations[number]["object"]
    removed = [operation["object"] for operation in operations[number + 1 :] if operation["op"] == "remove"]
    return items[index - sum(place < index for place in removed)]


def _thing(item: Item) -> str:
    return vocabulary.with_article(grammar.name_of(item))


def _with_object(kind: str, pair: Pair, number: int, **slots: str) -> Asked | None:
    reference = _reference(pair, number)
    return Asked(kind, {"object": reference, **slots}) if reference else None


def _recolour(pair: Pair, number: int) -> Asked | None:
    return _with_object("recolour", pair, number, colour=pair.target_scene["edit"][number]["to"])


def _remove(pair: Pair, number: int) -> Asked | None:
    if pair.target_scene["edit"][number]["object"] == "all":
        return Asked("remove_all", {})
    return _with_object("remove", pair, number)


def _add(pair: Pair, number: int) -> Asked | None:
    operation, thing = pair.target_scene["edit"][number], _thing(_made(pair, number))
    if "relation" in operation:
        anchor = _reference(pair, number, "anchor")
        place = f"{RELATIONS[operation['relation']]} {anchor}"
        return Asked("add", {"thing": thing, "place": place}) if anchor else None
    spot = operation["spot"]
    if any(words in pair.instruction.lower() for words in SPOT_WORDS[spot]):
        return Asked("add", {"thing": thing, "place": PLACES[spot]})
    return Asked("add_free", {"thing": thing})


def _replace(pair: Pair, number: int) -> Asked | None:
    return _with_object("replace", pair, number, thing=_thing(_made(pair, number)))


def _background(pair: Pair, number: int) -> Asked | None:
    spec = pair.target_scene["background"]
    if spec["kind"] == "plain":
        return Asked("background_plain", {"colour": spec["colours"][0]})
    if spec["kind"] == "pattern":
        *way, kind = spec["name"].split()
        scenery = f"{' '.join([*way, PATTERN[kind]])} in {' and '.join(spec['colours'])}"
    else:
        nouns = {"sea": "the sea", "mountains": "mountains"}
        scenery = nouns.get(spec["name"]) or vocabulary.with_article(spec["name"])
    return Asked("background", {"scenery": scenery})


def _move(pair: Pair, number: int) -> Asked | None:
    operation = pair.target_scene["edit"][number]
    if "direction" in operation:
        return _with_object("shift", pair, number, side=SIDES[operation["direction"]])
    return _with_object("move", pair, number, goal=PLACES[operation["spot"]])


def _resize(pair: Pair, number: int) -> Asked | None:
    return _with_object(pair.target_scene["edit"][number]["to"], pair, number)


def _rotate(pair: Pair, number: int) -> Asked | None:
    return _with_object(pair.target_scene["edit"][number]["way"], pair, number)


def _material(pair: Pair, number: int) -> Asked | None:
    wanted = pair.target_scene["edit"][number]["to"]
    kind = "pattern" if wanted in ("striped", "spotted") else "material"
    return _with_object(kind, pair, number, stuff=STUFF[wanted][0])


def _text(pair: Pair, number: int) -> Asked | None:
    operation = pair.target_scene["edit"][number]
    if operation["to"] is None:
        return Asked("text_remove", {})
    if "spot" not in operation:
        return Asked("text_change", {"word": operation["to"]})
    sign = next(item for item in objects_of(pair)[1] if item.kind == "sign")
    return Asked("text_add", {"word": operation["to"], "place": PLACES[operation["spot"]], "colour": sign.colour or ""})


_LOCAL = {
    "recolour": _recolour, "remove": _remove, "add": _add, "replace": _replace, "background": _background,
    "move": _move, "resize": _resize, "rotate": _rotate, "material": _material, "text": _text,
}  # fmt: skip


def fill(text: str, slots: dict[str, str]) -> str:
    text = text.format(**slots)
    return re.sub(r"\ba (?=[aeio])", "an ", text)


def paraphrase(pair: Pair, texts: dict[str, list[str]], rng: random.Random) -> str | None:
    """The pair's instruction as a person would type it; None if its objects cannot be named."""
    edits = asked(pair)
    if edits is None:
        return None
    parts = [fill(rng.choice(texts[edit.kind]), edit.slots) for edit in edits]
    if len(parts) == 1:
        return parts[0]
    return rng.choice(texts["composition"]).format(first=parts[0], second=parts[1])


# -- the comparison --


def rate(successes: list[bool]) -> str:
    """Share in percent with its 95 % Wilson interval."""
    found = binomtest(sum(successes), len(successes)).proportion_ci(method="wilson")
    return f"{100 * np.mean(successes):.1f} ({100 * found.low:.1f} to {100 * found.high:.1f})"


def choose(held_out: HeldOut, count: int) -> list[tuple[int, str]]:
    """The first held-out cases whose objects can be named, with what a person would type."""
    texts, cases = read_paraphrases(), list[tuple[int, str]]()
    for index in held_out.judgeable():
        if len(cases) == count:
            break
        said = paraphrase(held_out.pair(index), texts, random.Random(f"paraphrase {index}"))
        if said is not None:
            cases.append((index, said))
    return cases


def compare(pipeline: VAREditPipeline, held_out: HeldOut, cases: list[tuple[int, str]]) -> list[dict]:
    """Edit every case in both wordings with its index as seed; verdicts of each."""
    pairs = [held_out.pair(index) for index, _ in cases]
    wordings = {"grammar": [pair.instruction for pair in pairs], "paraphrase": [said for _, said in cases]}
    rows: list[dict] = [{"index": index, "type": pair.edit_type} for pair, (index, _) in zip(pairs, cases)]
    for name, prompts in wordings.items():
        requests = [
            EditRequest(Image.fromarray(pair.source), prompt, seed=index)
            for pair, prompt, (index, _) in zip(pairs, prompts, cases)
        ]
        for row, pair, prompt, result in zip(rows, pairs, prompts, apply_edits(pipeline, requests)):
            verdict = held_out.check(pair, np.asarray(result.image))
            row[name] = {"instruction": prompt, "success": verdict.success, "completeness": verdict.completeness}
    return rows


def main(
    objects: Annotated[Path | None, typer.Option(help="Folder of cut-outs.")] = None,
    photos: Annotated[Path | None, typer.Option(help="Folder of photographs.")] = None,
    model: Annotated[str | None, typer.Option(help="Model folder or hub name.")] = None,
    count: int = 300,
    batch_size: int = 25,
    output: Annotated[Path | None, typer.Option(help="Markdown file; with a .jsonl of all cases beside it.")] = None,
) -> None:
    pipeline = load_pipeline(model)
    pipeline.set_progress_bar_config(disable=True)
    held_out = HeldOut(objects, photos, pipeline.config.size, seed=SEED)
    cases, rows = choose(held_out, count), list[dict]()
    for first in range(0, count, batch_size):
        rows += compare(pipeline, held_out, cases[first : first + batch_size])
        typer.echo(f"{len(rows)} of {count} cases", err=True)
    text = report(rows, model or "the default model")
    typer.echo(text)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_durably(output.with_suffix(".jsonl"), lines.encode())
        write_durably(output, f"{text}\n".encode())


def report(rows: list[dict], model: str) -> str:
    """Success by type in both wordings, and their difference with its paired bootstrap interval."""
    lines = [
        f"# Paraphrases: {model}",
        "",
        f"{len(rows)} held-out cases, each edited in the grammar's words and in a person's, same seed. Success "
        "in percent by the exact checker on the preserved result, 95 % Wilson intervals; mean completeness behind it.",
        "",
        "| type | n | grammar | paraphrase | completeness, grammar | paraphrase |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in [*sorted({row["type"] for row in rows}), "all"]:
        part = [row for row in rows if name in ("all", row["type"])]
        success = [rate([row[way]["success"] for row in part]) for way in ("grammar", "paraphrase")]
        mean = [f"{np.mean([row[way]['completeness'] for row in part]):.2f}" for way in ("grammar", "paraphrase")]
        lines.append(f"| {name} | {len(part)} | {' | '.join([*success, *mean])} |")
    gaps = bootstrap(
        [100.0 * (row["paraphrase"]["success"] - row["grammar"]["success"]) for row in rows], "paraphrases"
    )
    lines += [
        "",
        f"Paraphrase less grammar: {gaps.mean:+.1f} points, 95 % interval {gaps.low:+.1f} to {gaps.high:+.1f}.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
