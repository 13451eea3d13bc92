"""The sample photograph and the drawn scene of `make edit`, and the before/after picture.

python docs/sample.py photo out/sample.jpg
python docs/sample.py scene out/scene.png
python docs/sample.py compare BEFORE AFTER OUT

The photograph (a cup of coffee, Rachel Michetti, CC0) comes with scikit-image. The scene is one of
the procedural world's test split, and one of those that the default model gets right.
"""

import sys
from pathlib import Path

import skimage.data
from PIL import Image, ImageOps

SIZE = (1200, 800)
GAP = 12


def photo(output: Path) -> None:
    """Write the sample photograph, 1200 x 800."""
    output.parent.mkdir(parents=True, exist_ok=True)
    ImageOps.fit(Image.fromarray(skimage.data.coffee()), SIZE, Image.Resampling.LANCZOS).save(output, quality=95)


def scene(output: Path) -> None:
    """Write a drawn scene, 576 x 432: the same one on every machine, since it has no emoji, which are the system's."""
    from varedit.data.synthetic.scene import Item, Renderer, Scene

    drawn = Scene(
        {"kind": "landscape", "name": "meadow", "seed": 270456986},
        (
            Item("primitive", "cylinder", 0.4711, 0.8184, 0.259, "black", shade=3, material="matte"),
            Item("shape", "circle", 0.1799, 0.3477, 0.379, "red"),
        ),
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(Renderer(None, None, "test", 432, 576).render(drawn)).save(output)


def compare(before: Path, after: Path, output: Path) -> None:
    """Write two pictures of one size side by side, each half as wide as the sample."""
    pictures = [ImageOps.contain(Image.open(path).convert("RGB"), (SIZE[0] // 2, SIZE[1])) for path in (before, after)]
    width, height = pictures[0].size
    sheet = Image.new("RGB", (2 * width + GAP, height), "white")
    for index, picture in enumerate(pictures):
        sheet.paste(picture, (index * (width + GAP), 0))
    sheet.save(output, quality=92)
    sys.stdout.write(f"before and after: {output}\n")


if __name__ == "__main__":
    command, *paths = sys.argv[1:] or [""]
    commands = {("photo", 1): photo, ("scene", 1): scene, ("compare", 3): compare}
    if (command, len(paths)) not in commands:
        sys.exit(__doc__)
    commands[command, len(paths)](*map(Path, paths))
