"""A gallery of held-out edits, failures included: source, result, known answer, and the exact checker's verdict.

    python benchmarks/gallery.py --objects DIR --photos DIR --output out/gallery
    python benchmarks/gallery.py --committed --objects DIR --output docs/gallery

Writes OUTPUT/gallery.jpg and OUTPUT/gallery.md. Which 40 cases of the test split are shown depends on their kind alone,
never on the result: the first ones of every type, on photographs and in drawn scenes. Results are what `varedit edit`
gives, with untouched pixels preserved. The same model and folders give the same files.

--committed uses only pictures that may be shown anywhere: the photographs below, which come with scikit-image, instead
of --photos, and of --objects only the drawn cut-outs.
"""

import io
import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Annotated

import numpy as np
import typer
from PIL import Image, ImageDraw, ImageFont

from varedit.data.synthetic import Pair
from varedit.durable import write_durably
from varedit.editing.edit import EditRequest, apply_edits
from varedit.evaluation.checker import Verdict
from varedit.evaluation.held_out import HeldOut
from varedit.pipeline import VAREditPipeline, load_pipeline

SEED = 41
"""Of the stream of held-out pairs."""

SHOWN: dict[str, tuple[int, int]] = {
    "tone": (5, 1), "style": (2, 1), "weather": (2, 1), "recolour": (1, 3), "remove": (2, 2), "add": (2, 2),
    "background": (1, 1), "replace": (1, 1), "move": (1, 1), "resize": (1, 1), "rotate": (1, 1), "material": (1, 1),
    "text": (1, 1), "composition": (1, 1),
}  # fmt: skip
"""Type -> how many cases on photographs, and in drawn scenes."""

PHOTOGRAPHS = {
    "coffee.png": "coffee, Rachel Michetti, CC0",
    "chelsea.png": "Chelsea the cat, Stefan van der Walt, CC0",
    "rocket.jpg": "launch of DSCOVR, SpaceX, public domain",
}
"""Of scikit-image -> credit."""

DRAWN = {
    "MIT, (c) Microsoft Corporation": "Fluent Emoji, (c) Microsoft Corporation, MIT License",
    "Apache-2.0, (c) Google (png/ images)": "Noto Emoji, (c) Google LLC, Apache License 2.0",
    "Noto Emoji, SIL OFL 1.1": "Noto Emoji, (c) Google LLC, SIL Open Font License 1.1",
}
"""Licence of a cut-out, as its folder names it -> credit."""

MAX_SCANNED = 5000
MAX_BYTES = 400_000
_SIDE, _GAP, _MARGIN, _FONT, _LINE, _NUM_LINES, _NUM_COLUMNS = 128, 4, 14, 15, 19, 3, 3


@dataclass(frozen=True)
class Shown:
    """One case of the gallery."""

    index: int
    pair: Pair
    result: Image.Image
    verdict: Verdict


def choose(held_out: HeldOut, with_photos: bool, allowed: set[str] | None) -> list[int]:
    """Indices of the cases to show, by type, photographs first.

    Args:
        with_photos: False gives the photographs' places to drawn scenes.
        allowed: licences; pairs with any other are passed over. None allows all.
    """
    left = {
        (kind, photo): count
        for kind, (on_photos, drawn) in SHOWN.items()
        for photo, count in ((True, on_photos * with_photos), (False, drawn + on_photos * (not with_photos)))
    }
    found: list[tuple[int, bool, int]] = []
    taken: Counter[str] = Counter()
    order = list(SHOWN)
    for index in held_out.judgeable():
        if not any(left.values()) or index > MAX_SCANNED:
            break
        pair = held_out.pair(index)
        photo = pair.scene["background"]["kind"] == "photo"
        operation = pair.target_scene["edit"][0]
        name = operation.get("name") or operation.get("way") or str(index)
        free = allowed is None or set(held_out.world.licences(pair)) <= allowed
        if left[pair.edit_type, photo] and free and not taken[name]:  # of whole-picture edits no two alike
            left[pair.edit_type, photo] -= 1
            taken[name] += 1
            found.append((order.index(pair.edit_type), not photo, index))
    return [index for _, _, index in sorted(found)]


def edit(pipeline: VAREditPipeline, held_out: HeldOut, indices: list[int]) -> list[Shown]:
    """Edit the chosen cases as a person's edits are made, and judge them."""
    shown = []
    for index in indices:
        pair = held_out.pair(index)
        (result,) = apply_edits(pipeline, [EditRequest(Image.fromarray(pair.source), pair.instruction, seed=index)])
        shown.append(Shown(index, pair, result.image, held_out.check(pair, np.asarray(result.image))))
    return shown


# -- the sheet and the page --


def draw_sheet(shown: list[Shown]) -> Image.Image:
    """Three cases a row: the instruction, then source, result and known answer side by side."""
    width = 3 * _SIDE + 2 * _GAP
    height = _NUM_LINES * _LINE + _SIDE + _MARGIN
    num_rows = -(-len(shown) // _NUM_COLUMNS)
    sheet = Image.new(
        "RGB", (_MARGIN + _NUM_COLUMNS * (width + _MARGIN), _MARGIN + _LINE + num_rows * height + _MARGIN), "white"
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT)
    draw.text((_MARGIN, 8), "each case: source | edit | known answer", (110, 110, 110), font)
    for number, case in enumerate(shown):
        left = _MARGIN + number % _NUM_COLUMNS * (width + _MARGIN)
        top = _MARGIN + _LINE + number // _NUM_COLUMNS * height
        colour, word = ((20, 130, 50), "done") if case.verdict.success else ((190, 40, 30), "not done")
        label = f"{number + 1}. {case.pair.edit_type}: {word}"
        draw.text((left, top), label, colour, font)
        for line, text in enumerate(wrap(case.pair.instruction, 52)[: _NUM_LINES - 1], start=1):
            draw.text((left, top + line * _LINE), text, (20, 20, 20), font)
        for place, picture in enumerate((case.pair.source, case.result, case.pair.target)):
            image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
            image = image if image.size == (_SIDE, _SIDE) else image.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
            sheet.paste(image, (left + place * (_SIDE + _GAP), top + _NUM_LINES * _LINE))
    return sheet


def encode(sheet: Image.Image, max_bytes: int = MAX_BYTES) -> bytes:
    """JPEG of at most so many bytes, as good as that allows."""
    for quality in range(92, 20, -4):
        buffer = io.BytesIO()
        sheet.save(buffer, "JPEG", quality=quality, subsampling=0 if quality > 70 else 2, optimize=True)
        if buffer.tell() <= max_bytes:
            return buffer.getvalue()
    raise ValueError(f"a sheet of {sheet.width} x {sheet.height} pixels does not fit into {max_bytes} bytes")


def page(shown: list[Shown], model: str, credits: list[str]) -> str:
    """The gallery as Markdown."""
    done = sum(case.verdict.success for case in shown)
    on_photos = sum(case.pair.scene["background"]["kind"] == "photo" for case in shown)
    lines = [
        "# Gallery",
        "",
        f"{len(shown)} held-out cases edited by {model}, {on_photos} of them on photographs, chosen by kind before any "
        f"was edited. Each: source, edit, known answer. The exact checker calls {done} of them done.",
        "",
        "![Source, edit and known answer of every case](gallery.jpg)",
        "",
        "| | type | instruction | never seen in training | done | completeness | changed astray |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for number, case in enumerate(shown, start=1):
        new = ", ".join(case.pair.held_out) or "scene"
        verdict = case.verdict
        lines.append(
            f"| {number} | {case.pair.edit_type} | {case.pair.instruction} | {new} | "
            f"{'yes' if verdict.success else 'no'} | {verdict.completeness:.2f} | {verdict.stray:.1%} |"
        )
    lines += ["", "Pictures: drawn by varedit's procedural world with", ""]
    return "\n".join([*lines, *(f"- {credit}" for credit in credits), ""])


# -- free pictures --


@contextmanager
def free_photographs() -> Iterator[Path]:
    """A folder of `PHOTOGRAPHS` as the world reads it."""
    import skimage.data

    installed = Path(skimage.data.__file__).parent
    with tempfile.TemporaryDirectory() as name:
        rows = []
        for file, credit in PHOTOGRAPHS.items():
            with Image.open(installed / file) as image:
                image.convert("RGB").save(Path(name, file))
            rows.append(json.dumps({"file": file, "split": "test", "licence": credit}))
        Path(name, "index.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        yield Path(name)


def main(
    output: Annotated[Path, typer.Option(help="Folder of the sheet and the page.")],
    objects: Annotated[Path | None, typer.Option(help="Folder of cut-outs.")] = None,
    photos: Annotated[Path | None, typer.Option(help="Folder of photographs.")] = None,
    model: Annotated[str | None, typer.Option(help="Model folder or hub name.")] = None,
    committed: Annotated[bool, typer.Option("--committed", help="Only pictures that may be shown anywhere.")] = False,
) -> None:
    if committed and photos is not None:
        raise typer.BadParameter("--committed brings its own photographs; leave out --photos")
    pipeline = load_pipeline(model)
    pipeline.set_progress_bar_config(disable=True)
    size = pipeline.config.size
    if committed:
        with free_photographs() as folder:
            held_out = HeldOut(objects, folder, size, seed=SEED)
            shown = edit(pipeline, held_out, choose(held_out, True, {*DRAWN, *PHOTOGRAPHS.values()}))
    else:
        held_out = HeldOut(objects, photos, size, seed=SEED)
        shown = edit(pipeline, held_out, choose(held_out, photos is not None, None))
    licences = sorted({licence for case in shown for licence in held_out.world.licences(case.pair)})
    output.mkdir(parents=True, exist_ok=True)
    write_durably(output / "gallery.jpg", encode(draw_sheet(shown)))
    text = page(shown, model or "the default model", [DRAWN.get(licence, licence) for licence in licences])
    write_durably(output / "gallery.md", text.encode())
    typer.echo(f"{output / 'gallery.md'}: {sum(case.verdict.success for case in shown)} of {len(shown)} done")


if __name__ == "__main__":
    typer.run(main)
