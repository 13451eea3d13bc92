"""Options that several commands share: one wording, one type. None means the model's own default."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from PIL import Image

_MODELS = "the model's"

Model = Annotated[
    str | None, typer.Option(help="Model folder or Hugging Face name.", show_default="the model in the package")
]
GuidanceScale = Annotated[
    float | None, typer.Option(help="How strongly to follow the instruction; 1 is off.", show_default=_MODELS)
]
Temperature = Annotated[float | None, typer.Option(help="0 always takes the likelier bit.", show_default=_MODELS)]
TopP = Annotated[float | None, typer.Option(help="Drop choices less likely than 1 - p.", show_default=_MODELS)]
Size = Annotated[
    int | None, typer.Option(help="Size class: 128 (the default model's), 256, 512, 768 or 1024.", show_default=_MODELS)
]
Fit = Annotated[
    Literal["native", "square"] | None,
    typer.Option(help="Nearest aspect ratio, or a white square.", show_default=_MODELS),
]
Seed = Annotated[int | None, typer.Option(help="Same seed, same edit.", show_default="drawn")]
Preserve = Annotated[
    Literal["exact", "blend", "off"], typer.Option(help="What becomes of pixels that the edit did not change.")
]
Strength = Annotated[float, typer.Option(help="Of --preserve, from 0, as the model drew it, to 1.")]
Mask = Annotated[
    Path | None, typer.Option(help="Picture of the area to edit: white = edit here.", show_default="everywhere")
]
Box = Annotated[
    str | None, typer.Option(help="X,Y,WIDTH,HEIGHT of the area to edit, in pixels.", show_default="everywhere")
]
Polygon = Annotated[
    str | None, typer.Option(help="'X,Y X,Y X,Y ...': corners of the area to edit.", show_default="everywhere")
]
MaskConvention = Annotated[
    Literal["white", "transparent"], typer.Option(help="Which pixels of a mask are to be edited.")
]
MaskMargin = Annotated[int, typer.Option(help="Grow the area by so many pixels, so that nothing is cut off.")]
Lock = Annotated[
    Literal["auto", "mask", "two-pass", "off"],
    typer.Option(
        help="Hold the tokens outside the area; auto: unless the edit is one of the whole picture, which a first pass "
        "tells (twice the time); two-pass: outside what a first pass changed."
    ),
]
Crop = Annotated[
    Literal["auto", "off"], typer.Option(help="Edit a small area of a large picture at the model's full size.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps.", show_default="the best at hand")]
Dtype = Annotated[Literal["float32", "bfloat16"] | None, typer.Option(help="Precision.", show_default="by device")]


def check_request(instruction: str, seed: int | None) -> None:
    """Refuse, before the model is loaded, what no model can do."""
    from varedit.pipeline import check_prompt, check_seed

    check_prompt(instruction)
    if seed is not None:
        check_seed(seed)


def out_of_memory(error: RuntimeError) -> str | None:
    """What a device says that has no more memory, in short; None of any other error."""
    said = str(error)
    if "DefaultCPUAllocator" in said:  # it says so after a line of its source
        return "there is not enough memory"
    # torch's own class, which not every command loads; MPS has none.
    is_it = type(error).__name__ == "OutOfMemoryError" or "out of memory" in said
    return said.split(". ")[0] if is_it else None


def edit_area(
    size: tuple[int, int],
    mask: Path | None,
    box: str | None,
    polygon: str | None,
    convention: Literal["white", "transparent"] = "white",
    mask_margin: int = 0,
) -> "Image.Image | None":
    """The mask of --mask, --box or --polygon at the image's size (width, height); None lets the edit go everywhere."""
    from varedit.editing.mask import box_mask, image_mask, parse_box, parse_polygon, polygon_mask

    areas = {"--mask": mask, "--box": box, "--polygon": polygon}
    given = [name for name, value in areas.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} both say where to edit; pass one of them")
    if mask_margin and not given:
        raise ValueError(f"--mask-margin {mask_margin} grows the area of {', '.join(areas)}; pass one of them too")
    if convention != "white" and mask is None:
        raise ValueError(f"--mask-convention {convention} is about --mask; pass a mask too")
    if box is not None:
        return box_mask(parse_box(box), size)
    if polygon is not None:
        return polygon_mask(parse_polygon(polygon), size)
    return image_mask(mask, size, convention) if mask is not None else None
