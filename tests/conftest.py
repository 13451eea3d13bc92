"""Folders that tests may use, and no network."""

import os
from pathlib import Path

import pytest

# Before anything imports huggingface_hub: a test that would download fails at once instead of waiting.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of recorded vectors and pictures that may lie beside the checkout."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs the folder ../shared beside the checkout (recorded vectors, pictures)")
    return folder


@pytest.fixture(scope="session")
def parity_dir(shared_dir: Path) -> Path:
    """Recorded inputs, weights and outputs of the released system."""
    folder = shared_dir / "parity"
    if not folder.is_dir():
        pytest.skip("needs the recorded vectors in ../shared/parity")
    return folder
