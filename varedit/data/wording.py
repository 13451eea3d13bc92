"""What is wrong with the words of an instruction: empty, in another language, or contradicting itself."""

from __future__ import annotations

import re
import unicodedata

# Frequent words of the languages instructions come in; each counts for its language only where no other shares it.
_WORDS: dict[str, str] = {
    "en": "a an the to of and or in on into with without make turn change add remove replace put set give let take "
    "move delete erase swap show have it is be as at by from this that them his her its more less please color colour "
    "background picture photo image should would could can for up down left right top bottom all every everything "
    "convert transform render draw place insert get rid paint use apply increase decrease brighten darken blur sharpen "
    "rotate flip mirror crop zoom style look like some bigger smaller larger brighter darker instead we you i",
    "de": "der die das den dem ein eine einen einem einer und oder nicht mit ohne auf aus zu zum zur im ist sind mache "
    "mach füge entferne ersetze ändere hinzu bild hintergrund farbe bitte soll werden durch für unter über zwischen",
    "fr": "le la les un une des du et ou dans sur avec sans au aux ce cette ces est sont pour par en ajoute ajouter "
    "ajoutez supprime supprimer enlève enlever remplace remplacer change changer mets mettre fais rends arrière plan "
    "couleur s'il veuillez image plus",
    "es": "el la los las un una unos unas y o en con sin por para del al es son está añade añadir agrega agregar quita "
    "quitar elimina eliminar cambia cambiar reemplaza reemplazar pon haz convierte fondo imagen color más favor",
    "it": "il lo la gli le un uno una e o in nel nella con senza per di del della dei al è sono aggiungi aggiungere "
    "rimuovi rimuovere togli sostituisci cambia cambiare rendi metti trasforma sfondo immagine colore più",
    "pt": "o a os as um uma uns umas e ou em no na com sem por para de do da ao é são adicione adicionar remova "
    "remover troque substitua mude mudar coloque faça deixe torne fundo imagem cor mais",
    "nl": "de het een en of in op met zonder van voor naar is zijn maak voeg toe verwijder vervang verander zet "
    "achtergrond afbeelding foto kleur deze dit naast onder boven",
}
LANGUAGES = tuple(_WORDS)
_SCRIPTS = {"LATIN"}


def _unique_words() -> dict[str, set[str]]:
    sets = {language: set(words.split()) for language, words in _WORDS.items()}
    return {
        language: {word for word in words if sum(word in other for other in sets.values()) == 1}
        for language, words in sets.items()
    }


_UNIQUE = _unique_words()
_ALL = {language: set(words.split()) for language, words in _WORDS.items()}


def is_empty(text: str) -> bool:
    """True without a single letter or digit."""
    return not any(character.isalnum() for character in text)


def foreign(text: str, language: str = "en") -> str | None:
    """Why a text is not in `language`, or None. Quoted words (text to be written in a picture) do not count.

    Short texts without any telling word pass: a false alarm costs more than a miss here.
    """
    plain = re.sub(r"[\"“”«»].*?[\"“”«»]|(?<!\w)'.*?'(?!\w)", " ", text)
    letters = [character for character in plain if character.isalpha()]
    others = [character for character in letters if unicodedata.name(character, "").split(" ")[0] not in _SCRIPTS]
    if letters and len(others) > 0.3 * len(letters):
        return f"{len(others)} of {len(letters)} letters are not Latin, such as {''.join(others[:8])!r}"
    words = re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?", plain.lower())
    ours = sum(word in _ALL[language] for word in words)
    for other, unique in _UNIQUE.items():
        if other == language:
            continue
        telling = [word for word in words if word in unique]
        theirs = sum(word in _ALL[other] for word in words)
        if telling and theirs >= 2 and theirs > 1.5 * ours:
            return f"reads as {other}, not {language} ({', '.join(dict.fromkeys(telling[:4]))})"
    return None


# ---- contradictions ------------------------------------------------------------------------------------------------
_OPPOSITES = (
    ("brighten brighter lighten lighter", "darken darker"),
    ("bigger larger enlarge grow taller", "smaller shrink shorter"),
    ("increase raise more", "decrease reduce lower less"),
    ("blur blurry blurrier soften", "sharpen sharper"),
    ("warmer", "cooler colder"),
    ("day daytime noon", "night nighttime midnight"),
    ("summer", "winter snowy"),
    ("left leftwards", "right rightwards"),
    ("up upwards higher", "down downwards lower"),
    ("colourful colorful saturate vivid", "greyscale grayscale monochrome desaturate"),
    ("open", "close closed"),
    ("happy happier", "sad sadder"),
    ("younger young", "older old"),
)
_SIDES = tuple((set(first.split()), set(second.split())) for first, second in _OPPOSITES)
_COLOURS = set(
    "red orange yellow green blue purple pink brown black white grey gray turquoise cyan magenta violet gold silver "
    "beige teal navy maroon".split()
)
_ADD = {"add", "insert", "include", "place", "put"}
_REMOVE = {"remove", "delete", "erase", "eliminate"}
_MOVES = {"move", "shift", "slide", "push", "turn", "rotate"}
_SHADES = {"dark", "light", "bright", "pale", "deep", "more", "less"}
_KEEP = re.compile(
    r"^\W*(please\s+)?(do nothing|do not (change|edit|modify) (anything|the (image|picture|photo))"
    r"|don'?t (change|edit|modify) (anything|the (image|picture|photo))"
    r"|(leave|keep) (everything|it|the (image|picture|photo)) (as it is|unchanged|the same))\W*$"
)
_FILLER = set(
    "a an the it its this that them please some and then to of in on into with make turn change have let is be at by "
    "from more less much very bit little slightly same time also both".split()
)
_WHOLE = {"image", "picture", "photo", "scene", "photograph", "everything"}
_JOINTS = re.compile(r",?\s+(?:and then|and also|and|but|then|while|yet)\s+|[,;.]\s*")


def contradiction(text: str) -> str | None:
    """Why an instruction cannot be followed, or None.

    Found are: nothing to do, a colour changed to itself, one thing both added and removed, a thing changed after its
    removal, and opposite wishes for one thing. "Make the left dog bigger and the right dog smaller" is none.
    """
    lower = text.lower().strip()
    if _KEEP.match(lower):
        return "asks for no change"
    clauses = [clause for clause in (_clause(part) for part in _JOINTS.split(lower)) if clause]
    for clause in clauses:
        colour = _colour_to_itself(clause)
        if colour:
            return f"changes {colour} to {colour}"
    for number, first in enumerate(clauses):
        for second in clauses[number + 1 :]:
            found = _against(first, second)
            if found:
                return found
    return None


def _clause(part: str) -> list[str]:
    return re.findall(r"[^\W_]+", part)


def _wishes(clause: list[str]) -> set[str]:
    """Words of `_OPPOSITES`; left and right only where something moves, otherwise they say which thing is meant."""
    words = {word for pair in _SIDES for side in pair for word in side}
    return words if clause[:1] and clause[0] in _MOVES else words - {"left", "right"}


def _thing(clause: list[str]) -> frozenset[str]:
    """The words of a clause that say which thing is meant."""
    wishes = _wishes(clause)
    words = {word for word in clause if word not in _FILLER | wishes | _ADD | _REMOVE | _MOVES | _WHOLE}
    return frozenset(word.removesuffix("s") if len(word) > 3 else word for word in words)


def _against(first: list[str], second: list[str]) -> str | None:
    if first[0] in _MOVES and second[0] == "to":  # "move it to the left and to the right": one verb for both
        second = [first[0], *second]
    one, other = _thing(first), _thing(second)
    same = one == other or not other  # "it", or nothing at all, means what was named before
    verbs = set(first[:2]), set(second[:2])
    if one and one == other and (verbs[0] & _ADD and verbs[1] & _REMOVE or verbs[0] & _REMOVE and verbs[1] & _ADD):
        return f"adds and removes {' '.join(sorted(one))}"
    if one and verbs[0] & _REMOVE and not verbs[1] & (_ADD | _REMOVE) and _same_thing(one, second):
        return f"changes {' '.join(sorted(one))} after removing it"
    if not same:
        return None
    wishes = [_wishes(clause) & set(clause) - _qualified(clause, {"less"}) for clause in (first, second)]
    degrees = [_qualified(clause, {"more", "less"}) for clause in (first, second)]
    if all(degrees) and not degrees[0] & degrees[1]:  # "less blurry and more vivid": each of its own
        wishes = [words - {"more", "less"} for words in wishes]
    for left, right in _SIDES:
        for side, opposite in ((left, right), (right, left)):
            wanted, against = side & wishes[0], opposite & wishes[1]
            if wanted and against and not (opposite & set(first)) and not (side & set(second)):
                return f"asks for {sorted(wanted)[0]} and {sorted(against)[0]}"
    return None


def _qualified(clause: list[str], by: set[str]) -> set[str]:
    """The words of a clause that directly follow one of `by`."""
    return {word for before, word in zip(clause, clause[1:]) if before in by}


def _same_thing(removed: frozenset[str], clause: list[str]) -> bool:
    """True if a clause changes what was removed: `make the red ball blue`, `paint it blue`."""
    if clause[:1] and clause[0] in {"make", "paint", "turn", "recolour", "recolor", "move", "rotate", "enlarge"}:
        words = set(clause[1:]) - {"the", "a"}
        stems = {word.removesuffix("s") if len(word) > 3 else word for word in words}
        return removed <= stems or clause[1:2] == ["it"]
    return False


def _colour_to_itself(clause: list[str]) -> str | None:
    """The colour in `change the red car to red`, `make the red car red`."""
    if not clause or clause[0] not in {"change", "make", "turn", "paint", "recolour", "recolor"}:
        return None
    last, before = clause[-1], clause[1:-1]
    # "Change the red ball to dark red" and "make the red and blue car red" do change something.
    if last not in _COLOURS or [word for word in before if word in _COLOURS] != [last] or before[-1] == last:
        return None
    shaded = before[before.index(last) - 1] in _SHADES or before[-1] in _SHADES
    return None if shaded else last
