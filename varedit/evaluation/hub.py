"""Where the public benchmarks come from: downloads at one revision, and words where a person has to ask for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """Where a benchmark is published.

    Attributes:
        help: how to get it by hand.
        repository: data set on the Hugging Face hub that can be downloaded as it is; empty if there is none.
        revision: commit that is taken unless told otherwise; empty takes the newest. Either way the commit goes into
            the protocol.
        files: patterns of the files that are needed.
    """

    help: str
    repository: str = ""
    revision: str = ""
    files: tuple[str, ...] = ()


SOURCES = {
    "emu-edit": Source(
        "download the data set facebook/emu_edit_test_set from the Hugging Face hub (CC BY-NC 4.0)",
        "facebook/emu_edit_test_set",
        "b31936a0b6c267e87d373014034cd8fb44ced2fb",
        ("data/*.parquet",),
    ),
    "pie-bench": Source(
        "ask for it with the form linked in the PnPInversion repository; DATA holds mapping_file.json and "
        "annotation_images/"
    ),
    "magicbrush": Source(
        "take osunlp/MagicBrush (dev) from the hub, or the test zip (password in its README); DATA holds data/ or "
        "edit_sessions.json and images/",
        "osunlp/MagicBrush",
        files=("data/dev-*.parquet",),
    ),
    "imgedit": Source(
        "take Benchmark.tar of sysuyy/ImgEdit from the hub and the lists from the ImgEdit repository; DATA holds "
        "basic_edit.json and the pictures"
    ),
    "gedit": Source(
        "download the data set stepfun-ai/GEdit-Bench from the Hugging Face hub (MIT)",
        "stepfun-ai/GEdit-Bench",
        files=("*.parquet", "*.arrow"),
    ),
}


def download(name: str, revision: str | None = None) -> tuple[Path, str]:
    """The files of a benchmark from the hub (or its local cache): their folder, and the commit they are of.

    Args:
        revision: commit, branch or tag; None takes the pinned one, or the newest.

    Raises:
        ValueError: no repository, no network, no access. The message says how to get the files by hand.
    """
    source = SOURCES[name]
    if not source.repository:
        raise ValueError(f"{name} needs --data: {source.help}")
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            source.repository,
            revision=revision or source.revision or None,
            repo_type="dataset",
            allow_patterns=list(source.files),
        )
    except (OSError, ValueError) as error:  # the hub's own errors are OSErrors
        raise ValueError(
            f"{name} is not at hand and cannot be downloaded ({type(error).__name__}); {source.help} and pass --data"
        ) from error
    return Path(folder), Path(folder).name  # the cache names the folder of a snapshot by its commit
