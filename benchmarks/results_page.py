"""What the commands of this folder end with: the page of results, shown and kept."""

from collections.abc import Sequence
from pathlib import Path

import typer


def publish(lines: Sequence[str], output: Path | None) -> None:
    """Show a Markdown page, and write it if a file is named."""
    page = "\n".join(lines).rstrip("\n")
    typer.echo(page)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(page + "\n")
