"""`varedit convert`: released checkpoints -> a model folder."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from varedit.presets import PRESETS


def convert(
    transformer: Annotated[
        Path, typer.Option(help="Checkpoint: .pth, .safetensors, or a folder of shards.", show_default=False)
    ],
    image_tokenizer: Annotated[Path, typer.Option(help="Checkpoint of the tokenizer (VAE).", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.", show_default=False)],
    text_encoder: Annotated[
        str | None,
        typer.Option(help="Folder or Hugging Face name; without it, edits need prompt_embeds.", show_default=False),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help=f"What tensors cannot tell: {', '.join(PRESETS)}.", show_default=False),
    ] = None,
    position_layout: Annotated[
        Literal["offset", "fixed_offset", "released"] | None, typer.Option(show_default="the preset's, or released")
    ] = None,
    fit: Annotated[Literal["native", "square"] | None, typer.Option(show_default="the preset's, or square")] = None,
    size: Annotated[int | None, typer.Option(help="Size class.", show_default="the preset's, or 512")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None, typer.Option(help="Stored precision.", show_default="the checkpoint's")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing folder.")] = False,
) -> None:
    """Convert a released VAREdit or Infinity checkpoint into a folder that varedit loads."""
    import torch

    from varedit.convert import convert as convert_checkpoint

    convert_checkpoint(
        transformer,
        image_tokenizer,
        output,
        text_encoder=text_encoder,
        preset=preset,
        position_layout=position_layout,
        fit=fit,
        size=size,
        dtype=getattr(torch, dtype) if dtype else None,
        overwrite=overwrite,
    )
    use = f"varedit edit IMAGE INSTRUCTION --model {output} uses it" if text_encoder else "it takes prompt_embeds"
    typer.echo(f"{output}: written; {use}")
