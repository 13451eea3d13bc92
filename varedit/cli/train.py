"""`varedit train`: the editor and the image tokenizer, on one process or, started by torchrun, on many."""

import logging
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from varedit.cli import options
from varedit.cli.edit import load_model

if TYPE_CHECKING:
    from varedit.training.config import RunConfig

app = typer.Typer(help="Train the editor or the image tokenizer.", no_args_is_help=True)

ConfigFile = Annotated[Path, typer.Option(help="YAML file of the run; see docs/training.md.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="field=value, instead of the file's; may be repeated.")
]
Output = Annotated[
    Path, typer.Option("--output", "-o", help="Folder of the run, a new one unless --resume.", show_default=False)
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in OUTPUT.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only check the config, and say sizes and memory.")]


@app.command()
def editor(
    config: ConfigFile, output: Output, overrides: Overrides = None, resume: Resume = False, dry_run: DryRun = False
) -> None:
    """Train the transformer, whole or by adapters (LoRA): varedit train editor --config FILE --output RUN."""
    from varedit.training.config import EditorConfig, load_config

    settings = load_config(EditorConfig, config, overrides or [])
    if dry_run:
        from varedit.training.estimate import estimate

        for line in estimate(settings, int(os.environ.get("WORLD_SIZE", 1))).lines():
            typer.echo(line)
        return
    _train(settings, output, resume)


@app.command()
def tokenizer(config: ConfigFile, output: Output, overrides: Overrides = None, resume: Resume = False) -> None:
    """Train the image tokenizer: varedit train tokenizer --config FILE --output RUN."""
    from varedit.training.config import TokenizerConfig, load_config

    _train(load_config(TokenizerConfig, config, overrides or []), output, resume)


@app.command()
def merge(
    adapters: Annotated[
        list[str], typer.Argument(help="Folders of adapters (RUN/lora), or FOLDER=FACTOR.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the new model.", show_default=False)],
    model: options.Model = None,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of the new model's weights.")] = "bfloat16",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing model folder.")] = False,
) -> None:
    """Add adapters into their model and save it as one that every command takes: --model OUTPUT."""
    from varedit.lora import load_lora, merge_lora, stack_lora
    from varedit.model_folder import check_folder, forget_origin, written_whole

    check_folder(output, overwrite)
    factors: dict[str, float] = {}
    for folder, factor in map(_factor, adapters):
        if folder in factors:
            raise ValueError(f"adapter {folder!r} is named twice; name it once, with the factor it is to have")
        factors[folder] = factor
    pipeline = load_model(model, "cpu", dtype)
    names = {folder: f"adapter{number}" for number, folder in enumerate(factors)}
    for folder, name in names.items():
        load_lora(pipeline, folder, name)
    stack_lora(pipeline, {names[folder]: factor for folder, factor in factors.items()})
    merge_lora(pipeline)
    with written_whole(output) as partial:
        pipeline.save_pretrained(partial)
        forget_origin(partial)
    typer.echo(f"{output}: {len(factors)} merged")


def _factor(text: str) -> tuple[str, float]:
    """FOLDER or FOLDER=FACTOR. Raises ValueError."""
    folder, found, factor = text.rpartition("=")
    if not found or Path(text).exists():
        return text, 1.0
    try:
        if math.isfinite(value := float(factor)):
            return folder, value
    except ValueError:
        pass
    raise ValueError(f"adapter {text!r} has the factor {factor!r}, which is no number; use FOLDER or FOLDER=0.7")


def _train(settings: "RunConfig", output: Path, resume: bool) -> None:
    first = int(os.environ.get("RANK", 0)) == 0
    logging.getLogger("varedit").setLevel(logging.INFO if first else logging.WARNING)

    import torch.distributed.checkpoint

    if not hasattr(torch.distributed.checkpoint, "HuggingFaceStorageWriter"):
        raise ValueError(
            f"training needs PyTorch 2.9, this is {torch.__version__}; pip install -c constraints.txt '.[train]'"
        )
    from varedit.training.checkpoint import CheckpointError
    from varedit.training.run import train

    try:
        steps = train(settings, output, resume)
    except CheckpointError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    except RuntimeError as error:
        full = options.out_of_memory(error)
        if full is None:
            raise
        raise ValueError(
            f"{full}: lower micro_batch_size, set gradient_checkpointing, or shard over several processes"
        ) from error
    if first:
        typer.echo(f"{output}: done, {steps} steps")
