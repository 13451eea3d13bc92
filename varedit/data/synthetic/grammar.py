"""Instructions in words: referring expressions, templates, and the small variations of how people write."""

from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING

from varedit.data.synthetic import vocabulary
from varedit.data.synthetic.more_phrases import more_phrases
from varedit.data.synthetic.phrases import KIND, PHOTO, PHOTO_KIND, PHRASES, PIC

if TYPE_CHECKING:
    from varedit.data.synthetic.scene import Item

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
NOT_JOINED = ("{ref}", "{where}", "I ", "there ", "the ", "no ", "more ", "less ", "black and", "where ")
# Openings of clauses that are no request, so that "please" does not fit.
STATEMENTS = (
    "the ", "there ", "I ", "in ", "at ", "on ", "to ", "under ", "above ", "below ", "no ", "more ", "less ", "where ",
    "a ", "an ", "all ", "any ", "as ", "everyone ", "everything ", "feels ", "for ", "from ", "gonna ", "he ", "i ",
    "i'd ", "I'd ", "i'm ", "I'm ", "if ", "is ", "it ", "it'd ", "it's ", "just ", "let's ", "like ", "looks ", "my ",
    "nobody ", "not ", "nothing ", "one ", "only ", "our ", "same ", "she ", "so ", "some ", "that ", "this ", "too ",
    "very ", "wanna ", "way ", "we ", "with ", "without ",
)  # fmt: skip
# Clauses that speak of more than their own edit, or of what the one before it named.
_BEYOND = re.compile(r"\b(it|its|rest|everything|nothing|unchanged|untouched|alone|same|anything)\b")
SAID = {"text_add": "colour"}  # key -> a slot that a clause has to name if it is given: the picture shows it
_SPACES = re.compile(r"\s+")


def _openings(template: str) -> set[str]:
    """The words that a template may begin with, lower case."""
    first = re.match(r"\[([^\[\]]*)\]", template)
    return {words.split()[0].rstrip(",:").lower() for words in (first[1].split("|") if first else [template]) if words}


# How the plain templates begin: with a verb, if not as in `STATEMENTS`.
_REQUESTS = frozenset().union(*(_openings(t) for seen, held_out in PHRASES.values() for t in (*seen, *held_out)))


def expand(rng: random.Random, template: str, slots: dict[str, str]) -> str:
    """Fill the slots of a template and make its free choices (innermost first)."""
    text = template
    for name, value in slots.items():
        text = text.replace("{" + name + "}", value)
    while match := _CHOICE.search(text):
        text = text[: match.start()] + rng.choice(match.group(1).split("|")) + text[match.end() :]
    assert "{" not in text, f"unfilled slot in {text!r}"
    return _SPACES.sub(" ", re.sub(r"\ba orange", "an orange", text)).strip()


def clause(
    rng: random.Random,
    key: str,
    slots: dict[str, str],
    *,
    photo: bool,
    held_out: bool,
    joined: bool = False,
    more: bool = False,
) -> str:
    """One plain clause for an edit, lower case, without a stop.

    Args:
        joined: one that reads well beside another.
        more: draw from `more_phrases` as well.
    """
    picture = PHOTO if photo else PIC
    if joined:  # "paint the ball red and blur it" would blur the ball
        picture = picture.replace("|it|", "|")
    filled = {"pic": picture, "kind": PHOTO_KIND if photo else KIND, **slots}
    templates = PHRASES[key][1 if held_out else 0]
    if more:
        templates += more_phrases()[key]
    usable = [t for t in templates if all(name in filled for name in re.findall(r"{(\w+)}", t))]
    if slots.get("ref") != f"the {slots.get('bare')}":  # else "a smaller banana" could be either of two
        usable = [t for t in usable if "{bare}" not in t or "{ref}" in t]
    if said := SAID.get(key):
        usable = [t for t in usable if (f"{{{said}}}" in t) == (said in filled)] or usable
    if joined:
        usable = [
            t for t in usable
            if " " in t and "?" not in t and not t.startswith(NOT_JOINED) and not _BEYOND.search(t)
            and _openings(t) <= _REQUESTS
        ] or usable  # fmt: skip
    return expand(rng, rng.choice(usable), filled)


def dress(rng: random.Random, text: str) -> str:
    """Politeness, capital letter and full stop, as people happen to write."""
    question = text.endswith("?")
    polite = re.search(r"\b(please|pls|kindly|thanks)\b", text) is not None
    imperative = not question and not polite and not text.startswith(STATEMENTS) and " " in text
    imperative = imperative and _openings(text) <= _REQUESTS
    chance = rng.random()
    if imperative and chance < 0.06:
        text = f"please {text}"
    elif imperative and chance < 0.09:
        text = f"{text}, please"
    elif imperative and chance < 0.12:
        text, question = f"{rng.choice(('can you', 'could you', 'could you please'))} {text}?", True
    if rng.random() < 0.5:
        text = text[0].upper() + text[1:]
    if not question and rng.random() < 0.3:
        text += "."
    return text


def references(items: tuple[Item, ...], index: int) -> list[str]:
    """Noun phrases with "the" that fit exactly one object of the scene; may be empty."""
    item = items[index]
    noun = item.name
    same = [i for i, other in enumerate(items) if i != index and vocabulary.same_kind(other.name, noun)]
    adjective = _adjective(item)
    found: list[str] = []
    if not same:
        found.append(f"the {noun}")
        if adjective and item.kind != "sprite":
            found += [f"the {adjective} {noun}"] * 2
    elif adjective and all(_adjective(items[i]) != adjective for i in same) and item.kind != "sprite":
        found += [f"the {adjective} {noun}"] * 3
    if len(same) == 1 and items[same[0]].name == noun:
        found += _compare(item, items[same[0]], noun)
    if item.kind == "shape" and len(items) == 2 and items[1 - index].kind in ("sprite", "sign"):
        found.append(f"the {item.colour} shape")
    if len(items) in (2, 3) and not vocabulary.is_plural(noun):
        found += _place_only(items, index)
    return found


def _adjective(item: Item) -> str | None:
    if item.kind == "primitive" and item.material not in (None, "matte"):
        names = {"metal": "metal", "glass": "glass", "wood": "wooden", "striped": "striped", "spotted": "spotted"}
        return names[item.material or ""]
    return item.colour


def _compare(item: Item, other: Item, noun: str) -> list[str]:
    found = []
    if item.size > other.size * 1.4:
        found += [f"the {word} {noun}" for word in ("bigger", "larger")]
    elif other.size > item.size * 1.4:
        found.append(f"the smaller {noun}")
    if item.x < other.x - 0.2:
        found += [f"the {noun} on the left", f"the left {noun}"]
    elif item.x > other.x + 0.2:
        found += [f"the {noun} on the right", f"the right {noun}"]
    if item.y < other.y - 0.25:
        found += [f"the upper {noun}", f"the {noun} at the top"]
    elif item.y > other.y + 0.25:
        found += [f"the lower {noun}", f"the {noun} at the bottom"]
    if found and item.size > other.size * 1.4 and item.x < other.x - 0.2:
        found.append(f"the bigger {noun} on the left")
    if found and other.size > item.size * 1.4 and item.x < other.x - 0.2:
        found.append(f"the smaller {noun} on the left")
    return found


def _place_only(items: tuple[Item, ...], index: int) -> list[str]:
    item = items[index]
    others = [other for i, other in enumerate(items) if i != index]
    found = []
    if item.x < 0.4 and all(other.x > item.x + 0.25 for other in others):
        found.append("the object on the left")
    if item.x > 0.6 and all(other.x < item.x - 0.25 for other in others):
        found.append("the object on the right")
    return found


def name_of(item: Item) -> str:
    """The object with its colour or material, without article ("red ball", "wooden cube", "dog")."""
    if item.kind == "sprite":
        return f"{item.colour} {item.name}" if item.colour else item.name
    adjective = _adjective(item)
    if item.kind == "primitive" and item.material in ("glass", "striped", "spotted"):
        return f"{adjective} {item.colour} {item.name}"
    return f"{adjective} {item.name}" if adjective else item.name


def listing(phrases: list[str]) -> str:
    """ "a, b and c"."""
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"
