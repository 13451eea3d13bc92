"""Folders that tests may use, the command in process, and no network."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

# Before anything imports huggingface_hub: a test that would download fails at once instead of waiting, whatever the
# user has set, and what the user has downloaded before makes no difference.
os.environ["HF_HUB_OFFLINE"] = "1"
_HUB = os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="varedit-tests-")
for _name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE", "TRANSFORMERS_OFFLINE", "DIFFUSERS_CACHE"):
    os.environ.pop(_name, None)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # before anything imports torch: workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_unconfigure() -> None:
    shutil.rmtree(_HUB, ignore_errors=True)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of recorded vectors and pictures that may lie beside the checkout."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs recorded vectors and pictures that are not in the repository")
    return folder


@pytest.fixture(scope="session")
def parity_dir(shared_dir: Path) -> Path:
    """Recorded inputs, weights and outputs of the released system."""
    folder = shared_dir / "parity"
    if not folder.is_dir():
        pytest.skip("needs the recorded vectors, which are not in the repository")
    return folder


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory) -> Iterator[None]:
    """Hashes of weights are remembered below a folder of this run, not in the user's home."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A tiny model on disk, not to be changed."""
    from varedit.testing import tiny_pipeline

    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(folder)
    return folder


@dataclass
class Ran:
    """What came of a command: its exit code and what it wrote."""

    code: int
    out: str
    err: str

    def assert_refused(self, *mentioned: str) -> None:
        """Exit code 2 and one line that names what was wrong (notes may stand before it)."""
        assert self.code == 2, self.err
        lines = [line for line in self.err.splitlines() if not line.startswith("note: ")]
        assert len(lines) == 1 and lines[0].startswith("error: "), self.err
        for text in mentioned:
            assert text in lines[0]


@pytest.fixture
def varedit(capsys) -> Callable[..., Ran]:
    """Run the command in process: varedit("edit", photo, "blur it") -> what came of it."""
    from varedit.cli import main

    def run(*arguments) -> Ran:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Ran(ended.value.code, out, err)

    return run
