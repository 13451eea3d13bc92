"""Opening the data of a run: what is trained on, what is held out, and a fingerprint of both."""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import nn

from varedit import __version__
from varedit.data.features import model_sha256, stored_facts
from varedit.data.shards import is_packed
from varedit.data.synthetic.sprites import emoji_font
from varedit.data.synthetic.world import REVISION
from varedit.paths import visible
from varedit.training.config import DataConfig, RunConfig
from varedit.training.data import IndexedPairs, Pairs, WorldPairs, stream_seed
from varedit.training.pair_index import check_pairs, load_entries, load_origin, pairs_origin, save_entries, scan
from varedit.training.processes import Processes

logger = logging.getLogger(__name__)

_INDEX, _FACTS = "pairs.index.json", "data.json"
_WRITTEN = (
    "environment.json", "metrics.jsonl", "log.txt", "checkpoints", "samples", "model", "lora", "image_tokenizer",
)  # fmt: skip
"""What a run writes beside its config and the facts about its data."""


def open_pairs(
    config: RunConfig, processes: Processes, folder: Path, models: dict[str, nn.Module] | None = None
) -> tuple[Pairs, Pairs | None]:
    """Pairs to train on and held-out pairs (None if the config wants none); writes `data.json` of the run.

    A folder is scanned once, by the first process; a resumed run reads the scan again, unless the file that lists the
    pairs, or the folder for validation, is another than was scanned.

    Args:
        models: the frozen "image_tokenizer" and "text_encoder" of the run, whose features are used where shards hold
            them. None leaves stored features alone.

    Raises:
        ValueError: the data cannot be used, has changed since the run began, or another number of its pairs would be
            held out; stored features are of other models.
    """
    data = config.data
    if data.validation and Path(data.source).resolve() == Path(data.validation).resolve():
        raise ValueError(
            f"data.validation is data.source, {data.source!r}: it would be validated on what is trained on; leave "
            "data.validation out to hold pairs out of the source"
        )
    for place in (data.source if data.source != "world" else None, data.validation if data.validation_count else None):
        if place:
            check_pairs(Path(place))
    facts: dict[str, Any] = {"source": data.source}
    if data.source == "world":
        for name in ("objects", "photos"):
            place = getattr(data, name)
            facts[name] = _listing(Path(place)) if place else None
        if not data.objects and emoji_font() is None:  # on a machine that has it there would be other things to draw
            facts["emoji_font"] = False
        pairs: Pairs = _open_world(config, config.seed, "train")
        held_out: Pairs | None = _open_world(config, config.seed + 1, "test") if data.validation_count else None
        facts["fingerprint"] = _digest([__version__, REVISION, facts])
    else:
        use_features = _has_features(Path(data.source), data, models)
        entries, facts["fingerprint"] = _entries(Path(data.source), folder / _INDEX, config, processes)
        facts |= {"pairs": len(entries), "stored_features": use_features}
        order = np.random.default_rng(stream_seed("held out", config.seed)).permutation(len(entries))
        count = 0 if data.validation else min(data.validation_count, len(entries) // 2)
        facts["held_out"] = count
        if not data.validation and count < data.validation_count:
            logger.warning("of %d pairs only %d are held out for validation", len(entries), count)
        kept = sorted(order[count:])
        pairs = IndexedPairs(Path(data.source), [entries[i] for i in kept], data, config.seed, use_features)
        held = [entries[i] for i in sorted(order[:count])]
        held_out = IndexedPairs(Path(data.source), held, data, config.seed, use_features) if held else None
    if data.validation and data.validation_count:
        use_features = _has_features(Path(data.validation), data, models)
        entries, facts["validation_fingerprint"] = _entries(
            Path(data.validation), folder / f"validation.{_INDEX}", config, processes
        )
        held = entries[: data.validation_count]
        held_out = IndexedPairs(Path(data.validation), held, data, config.seed, use_features)
    if processes.first:
        _write_facts(folder / _FACTS, facts)
    return pairs, held_out


def _open_world(config: RunConfig, seed: int, split: Literal["train", "test"]) -> WorldPairs:
    """The procedural world; folders that cannot be used show here, not pair by pair. Raises ValueError."""
    pairs = WorldPairs(config.data, seed, split)
    pairs.world(next(iter(pairs.weights)))
    return pairs


def _entries(source: Path, index: Path, config: RunConfig, processes: Processes) -> tuple[list[dict[str, Any]], str]:
    if processes.first and not _is_scanned(source, index):
        origin = pairs_origin(source)
        entries, tally = scan(source, config.data.max_bad_fraction)
        logger.info("%s: %s", source, tally.summary())
        index.parent.mkdir(parents=True, exist_ok=True)
        save_entries(entries, origin, index)
    processes.barrier()
    return load_entries(index)


def _is_scanned(source: Path, index: Path) -> bool:
    """Whether the stored scan is of these very pairs."""
    if not index.exists():
        return False
    origin = load_origin(index)
    # Earlier versions did not store it. What is trained on cannot be another folder, what validates can.
    return index.name == _INDEX if origin is None else origin == pairs_origin(source)


def _has_features(folder: Path, data: DataConfig, models: dict[str, nn.Module] | None) -> bool:
    """True where the shards hold features of these very models. Raises ValueError where they are others'."""
    stored = stored_facts(folder) if models is not None and is_packed(folder) else None
    if stored is None or models is None:
        return False
    for name, module in models.items():
        used = model_sha256(module)
        if stored[name] != used:
            raise ValueError(
                f"the features in {str(folder)!r} are of the {name} {stored[name][:12]} (of {stored['model']!r}), this "
                f"run's is {used[:12]}; pack again with --features of this run's model, or without"
            )
    missing = [size for size in data.sizes if size not in stored["sizes"]]
    if missing or stored["fit"] != data.fit:
        raise ValueError(
            f"the features in {str(folder)!r} are for sizes {stored['sizes']} and fit {stored['fit']}, this run has "
            f"{list(data.sizes)} and {data.fit}; pack again for these, or without --features"
        )
    return True


def _write_facts(path: Path, facts: dict[str, Any]) -> None:
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before["fingerprint"] != facts["fingerprint"]:
            raise ValueError(f"the data {facts['source']!r} has changed since this run began; begin a new run")
        now, then = facts.get("held_out"), before.get("held_out", facts.get("held_out"))
        if now != then:  # the run would be trained on other pairs, among them some that were held out
            raise ValueError(
                f"the run holds out {then} pairs of {facts['source']!r}, this config {now}; give data.validation and "
                "data.validation_count as in the run's config.yaml, or begin a new run"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(facts, indent=1), encoding="utf-8")
    os.replace(partial, path)


def _listing(folder: Path) -> str:
    """Digest of the names and sizes of a folder's files."""
    if not folder.is_dir():
        raise ValueError(f"data folder {str(folder)!r} is not there; give one that is, or leave it out")
    files = (path for path in visible(folder.rglob("*"), folder) if path.is_file())
    return _digest(sorted((path.relative_to(folder).as_posix(), path.stat().st_size) for path in files))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def check_new(folder: Path) -> None:
    """Raise ValueError if a folder holds what a run would write over. Leftovers of one that never began are none."""
    for name in _WRITTEN:
        if (folder / name).exists():
            raise ValueError(f"output {str(folder)!r} already holds {name!r}; give another folder")
    try:
        ours = "fingerprint" in json.loads((folder / _FACTS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    except (OSError, ValueError, TypeError):
        ours = False
    if not ours:
        raise ValueError(f"output {str(folder)!r} already holds another {_FACTS!r}; give another folder")


def forget_scans(folder: Path) -> None:
    """Remove what an attempt that never began has left in a run folder."""
    for name in (_INDEX, f"validation.{_INDEX}", _FACTS):
        (folder / name).unlink(missing_ok=True)
