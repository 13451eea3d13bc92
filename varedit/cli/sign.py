"""`varedit sign`: content credentials (C2PA) for an edited picture."""

from pathlib import Path
from typing import Annotated

import typer


def sign(
    file: Annotated[Path, typer.Argument(help="A PNG, JPEG or WebP that varedit edit wrote.", show_default=False)],
    certificate: Annotated[
        Path, typer.Option(help="PEM: the signer's certificate, then those it hangs on.", show_default=False)
    ],
    key: Annotated[Path, typer.Option(help="PEM: the signer's private key.", show_default=False)],
    input: Annotated[
        Path | None,
        typer.Option("--input", help="The picture that was edited, as the parent in the history.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Output file.", show_default="FILE, with --overwrite")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Sign an edited picture with C2PA content credentials: edited by AI, by which words and model. Sends nothing."""
    from varedit.cli.edit import check_outputs
    from varedit.editing.provenance import sign as sign_file

    target = file if output is None else output
    check_outputs(target, None, overwrite=overwrite, manifest=False)
    sign_file(file, target, certificate, key, source=input, overwrite=overwrite)
    typer.echo(f"{target}: signed")
