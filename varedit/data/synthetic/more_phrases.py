"""Further templates of instructions for the training split, written as those of `phrases`.

They widen how people may say an edit: trained on the templates of `phrases` alone, the default model understood those
far better than the held-out ones. The test split does not use them, so that its cases stay what they are.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files


@lru_cache(maxsize=1)
def more_phrases() -> dict[str, tuple[str, ...]]:
    """Key of an edit -> templates, from `more_phrases.tsv` (a line: key, tab, template)."""
    found: dict[str, list[str]] = {}
    for line in files(__package__).joinpath("more_phrases.tsv").read_text(encoding="utf-8").splitlines():
        key, template = line.split("\t")
        found.setdefault(key, []).append(template)
    return {key: tuple(templates) for key, templates in found.items()} | {"recolour_sprite": tuple(found["recolour"])}
