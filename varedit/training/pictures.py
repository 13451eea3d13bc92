"""Sheets of sample pictures with their instructions."""

from collections.abc import Sequence
from textwrap import wrap

from PIL import Image, ImageDraw, ImageFont

_LINE, _MARGIN = 16, 6
_LETTER = 7  # mean width of a letter of the caption's font, in pixels


def contact_sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]], titles: Sequence[str]) -> Image.Image:
    """One row a caption: its pictures side by side, each under its title.

    Args:
        rows: caption and RGB pictures, as many as there are titles.
        titles: of the columns.
    """
    width = max(sum(image.width + _MARGIN for image in images) for _, images in rows)
    captions = [wrap(caption, max(10, width // _LETTER)) or [""] for caption, _ in rows]
    heights = [
        max(image.height for image in images) + _LINE * (len(lines) + 1) + _MARGIN
        for (_, images), lines in zip(rows, captions)
    ]
    sheet = Image.new("RGB", (width + _MARGIN, sum(heights) + _MARGIN), "white")
    draw, font, top = ImageDraw.Draw(sheet), ImageFont.load_default(13), _MARGIN
    for (_, images), lines, height in zip(rows, captions, heights):
        for number, line in enumerate(lines):
            draw.text((_MARGIN, top + number * _LINE), line, "black", font)
        left, below = _MARGIN, top + _LINE * len(lines)
        for title, image in zip(titles, images, strict=True):
            draw.text((left, below), title, "gray", font)
            sheet.paste(image, (left, below + _LINE))
            left += image.width + _MARGIN
        top += height
    return sheet
