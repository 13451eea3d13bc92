"""Words and colours of the procedural world, and what is held out of training.

Everything here is data or a pure function of a name: which names are everyday ones, which take no article, which
objects, colour-shape combinations, phrasings and pairs of edits belong to the test split only.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 38, 40),
    "orange": (243, 140, 28),
    "yellow": (247, 218, 48),
    "green": (44, 160, 66),
    "blue": (40, 90, 215),
    "purple": (128, 54, 180),
    "pink": (248, 132, 188),
    "brown": (120, 74, 38),
    "black": (24, 24, 26),
    "white": (246, 246, 246),
    "grey": (132, 132, 134),
    "turquoise": (48, 198, 196),
}
# Colours that a hue shift can reach (the others need saturation or lightness to change).
HUES: dict[str, int] = {
    "red": 0,
    "orange": 30,
    "yellow": 54,
    "green": 128,
    "blue": 220,
    "purple": 278,
    "turquoise": 178,
}

SHAPES = (
    "circle", "square", "triangle", "star", "heart", "diamond", "hexagon", "pentagon", "cross", "crescent", "ring",
    "oval", "rectangle", "arrow",
)  # fmt: skip
PRIMITIVES = ("ball", "cube", "cone", "cylinder")
MATERIALS = ("matte", "metal", "glass", "wood", "striped", "spotted")
SIGN_WORDS = (
    "HELLO", "OPEN", "STOP", "SALE", "YES", "NO", "CAFE", "HI", "LOVE", "EXIT", "TAXI", "FREE", "NEW", "ZOO", "WOW",
    "BYE", "GO", "TEA", "BUS", "HOT", "SUN", "FUN", "ART", "FISH", "PARK", "SHOP", "ABC", "TOP", "WIN", "BAR",
)  # fmt: skip

CORE_NAMES = (
    "dog", "cat", "horse", "cow", "pig", "sheep", "rabbit", "elephant", "lion", "monkey", "bear", "panda", "bird",
    "duck", "penguin", "owl", "fish", "turtle", "butterfly", "ladybug", "honeybee", "frog", "tree", "palm tree",
    "rose", "sunflower", "mushroom", "cactus", "apple", "banana", "lemon", "strawberry", "grapes", "watermelon",
    "orange", "carrot", "pizza", "hamburger", "doughnut", "birthday cake", "ice cream", "car", "bus", "truck",
    "bicycle", "train", "plane", "rocket", "sailboat", "house", "snowman", "sun", "moon", "cloud", "umbrella",
    "balloon", "gift box", "soccer ball", "basketball", "guitar", "chair", "crown", "lightbulb", "teddy bear", "robot",
    "camera", "book", "cup of coffee", "glasses", "top hat",
)  # fmt: skip

PLURALS = frozenset((
    "grapes", "glasses", "sunglasses", "goggles", "jeans", "scissors", "socks", "gloves", "shorts", "briefs", "skis",
    "headphones", "cherries", "blueberries", "peanuts", "beans", "pancakes", "french fries", "books", "fireworks",
    "sparkles", "maracas", "chopsticks", "autumn leaves", "green leaves", "control knobs", "scales", "chains",
    "bubbles", "shopping bags", "clinking glasses", "crossed swords", "musical notes", "film frames",
    "paw prints", "theatre masks", "nesting dolls", "ballet shoes", "prayer beads", "paper clips",
    "black scissors", "open black scissors", "blue scissors", "admission tickets", "wicker chairs", "skates",
))  # fmt: skip
MASS = frozenset((
    "bacon", "broccoli", "lettuce", "garlic", "corn", "bread", "popcorn", "butter", "salt", "ice", "spaghetti",
    "sushi", "yarn", "thread", "soap", "coral", "ginger root", "curry with rice", "meat on the bone", "fire", "dna",
    "money with wings", "canned food", "shaved ice", "candy", "water", "falafel", "fondue", "custard", "toilet paper",
    "flatbread",
))  # fmt: skip
# Names that read badly in an instruction, show a scene rather than a thing, or are real persons.
EXCLUDED = frozenset((
    "aerial tramway", "antique key", "badminton racket and shuttlecock", "bathtub", "beach with umbrella", "bikini",
    "black bird", "black heart", "blossom", "blue heart", "bomb", "bowl with spoon", "bowling ball and pins",
    "briefs", "broken chain", "brown heart", "bus seen from the front", "camping", "card file box", "cat head",
    "chart decreasing", "chart increasing", "chemistry still", "chick in an egg", "child playing baseball",
    "cigarette", "cityscape", "coffin", "comet", "cow face", "cyclone", "dango", "derelict house", "desert",
    "desert island", "dizzy", "dna", "dog head", "dragon face", "ear of rice", "eight ball", "explosion",
    "first quarter moon face", "fish cake with swirl", "fork and knife", "fork and knife with plate",
    "fried egg in a pan", "funeral urn", "globe showing Americas", "globe showing Asia-Australia",
    "globe showing Europe-Africa", "goal", "green heart", "guide dog", "hair pick", "headstone", "heart with ribbon",
    "herb", "horse face", "hyacinth", "ice hockey stick and puck", "kiss mark", "knot", "label", "large dark bird",
    "last quarter moon face", "light rail", "low battery", "magnifying glass tilted right", "martial arts uniform",
    "mate", "meat on the bone", "metro", "microbe", "milky way", "minidisc", "money with wings", "monkey face",
    "mount fuji", "mountain cableway", "mountain railway", "mouse face", "new moon face", "no-entry",
    "notepad and pencil", "nut and bolt", "oden", "old propeller airplane", "one-piece swimsuit",
    "open black scissors", "orange heart", "page facing up", "person", "pick", "pig face", "pig nose", "pill",
    "police car seen from the front", "poop", "poop emoji", "pouring liquid", "purple heart", "rabbit face",
    "railway track", "red heart", "reminder ribbon", "ribbon", "roasted sweet potato", "root vegetable", "rosette",
    "row of houses", "sake", "saturn", "seedling", "service dog", "shallow pan of food", "shower", "smiling woman",
    "snowy mountain", "speaker", "speaker high volume", "star-struck", "station", "Statue of Liberty",
    "steaming bowl", "sun behind cloud", "sun behind large cloud", "sun behind rain cloud", "sun behind small cloud",
    "suspension railway", "table tennis paddle", "television", "tiger face", "Tokyo tower", "two beer mugs",
    "water pistol", "water wave", "white heart", "wing", "world map", "x-ray", "yellow heart",
))  # fmt: skip
# Names of the sets that are not written as people write them.
RENAMED = {
    "red apple": "apple", "american football": "American football", "tv": "TV", "cd": "CD", "dvd": "DVD", "ufo": "UFO",
    "baguette bread": "baguette", "ferris wheel": "Ferris wheel", "hindu temple": "Hindu temple",
    "shinto shrine": "Shinto shrine", "bactrian camel": "Bactrian camel", "halloween pumpkin": "Halloween pumpkin",
    "red book": "book", "chocolate donut": "chocolate doughnut", "old white refrigerator": "refrigerator",
}  # fmt: skip
EXCLUDED_CATEGORIES = frozenset(("People",))

# Objects a viewer could call by the same word: two of one group in one scene make a reference ambiguous.
GROUPS: tuple[frozenset[str], ...] = tuple(
    frozenset(words.split())
    for words in (
        "dog poodle wolf fox raccoon",
        "cat tiger lion leopard",
        "bird duck penguin owl eagle dove parrot chicken rooster swan goose flamingo turkey chick peacock "
        "seagull seabird fowl dodo phoenix",
        "car taxi suv truck bus minibus ambulance van automobile trolleybus",
        "horse donkey zebra unicorn moose deer cow ox bison buffalo goat sheep ram",
        "bear panda koala",
        "tree cactus houseplant",
        "flower rose sunflower tulip hibiscus lotus daisy flowers",
        "plane airplane jet rocket",
        "ball soccer basketball volleyball baseball softball football",
        "train locomotive tram monorail",
        "boat sailboat ship ferry speedboat canoe",
        "circle oval ring ball",
        "square rectangle cube box diamond",
        "star sparkles",
        "moon crescent",
        "hexagon pentagon",
        "triangle cone",
        "house hut school hotel church castle",
        "book books notebook ledger",
        "cross arrow",
        "sheep goat lamb ram",
        "rabbit mouse rat hamster chipmunk",
        "monkey gorilla orangutan",
        "fish shark whale dolphin blowfish",
        "honeybee bug fly ant beetle ladybug cricket cockroach mosquito",
        "orange tangerine lemon lime mango peach apple",
        "cloud fog",
    )
)

HELD_OUT_EVERYDAY = frozenset(("owl", "cactus", "lemon", "hamburger", "sailboat", "lightbulb"))
HELD_OUT_PAIRS = frozenset((("remove", "tone"), ("recolour", "move"), ("add", "background")))


@lru_cache(maxsize=8192)
def _share(text: str) -> int:
    """A fixed number in 0..99 for a text (the same on every machine and run)."""
    return int(hashlib.sha1(text.encode()).hexdigest()[:8], 16) % 100


def held_out_name(name: str) -> bool:
    """True for the object names that training never shows (about 8 %; everyday names only by an explicit list)."""
    return name in HELD_OUT_EVERYDAY or (name not in CORE_NAMES and _share("name " + name) < 8)


def held_out_combination(colour: str | None, name: str) -> bool:
    """True for a colour and shape that training never shows together (about 8 % of the combinations)."""
    return colour is not None and _share(f"{colour}+{name}") < 8


def article(name: str) -> str:
    """ "a", "an" or "some" for a noun phrase."""
    head = name.split(" ")[-1] if name.split(" ")[0] in COLOURS else name
    if name in PLURALS or name in MASS or head in PLURALS:
        return "some"
    lowered = name.lower()
    if lowered.startswith(("hour", "8", "11", "x-", "suv")):
        return "an"
    if lowered.startswith(("uni", "use", "eu", "one", "ufo", "uku")):
        return "a"
    return "an" if lowered[0] in "aeiou" else "a"


def with_article(name: str) -> str:
    """The noun phrase with its indefinite article."""
    return f"{article(name)} {name}"


def is_plural(name: str) -> bool:
    """True where the verb and the pronoun are plural ("the grapes are")."""
    return name in PLURALS


@lru_cache(maxsize=65536)
def same_kind(a: str, b: str) -> bool:
    """True if a viewer could use one word for both names."""
    words_a, words_b = set(a.lower().split()), set(b.lower().split())
    if a.lower().split()[-1] in words_b or b.lower().split()[-1] in words_a:
        return True
    return any(words_a & group and words_b & group for group in GROUPS)
