"""Options that several commands share: one wording, one type. None means the model's own default."""

from pathlib import Path
from typing import Annotated, Literal

import typer

_MODELS = "the model's"

Model = Annotated[str | None, typer.Option(help="Model folder or hub name.", show_default="the model in the package")]
GuidanceScale = Annotated[
    float | None, typer.Option(help="How strongly to follow the instruction; 1 is off.", show_default=_MODELS)
]
Temperature = Annotated[float | None, typer.Option(help="0 always takes the likelier bit.", show_default=_MODELS)]
TopP = Annotated[float | None, typer.Option(help="Drop choices less likely than 1 - p.", show_default=_MODELS)]
Size = Annotated[int | None, typer.Option(help="Size class: 128, 256, 512, 768 or 1024.", show_default=_MODELS)]
Fit = Annotated[
    Literal["native", "square"] | None,
    typer.Option(help="Nearest aspect ratio, or a white square.", show_default=_MODELS),
]
Seed = Annotated[int | None, typer.Option(help="Same seed, same edit.", show_default="drawn")]
Preserve = Annotated[
    Literal["exact", "blend", "off"], typer.Option(help="What becomes of pixels that the edit did not change.")
]
Mask = Annotated[
    Path | None, typer.Option(help="Picture of the area to edit: white = edit here.", show_default="everywhere")
]
Box = Annotated[
    str | None, typer.Option(help="X,Y,WIDTH,HEIGHT of the area to edit, in pixels.", show_default="everywhere")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps.", show_default="the best at hand")]
Dtype = Annotated[Literal["float32", "bfloat16"] | None, typer.Option(help="Precision.", show_default="by device")]
