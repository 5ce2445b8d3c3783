"""The world that the miniature draws: sprites on backgrounds, in flat colours, with captions.

A `Scene` describes one picture; `caption` puts it into words. Whether a scene is held out from training depends on the
scene alone. This module knows words; `drawing` knows shapes.
"""

import hashlib
import random
from dataclasses import dataclass
from functools import cache

# Each list begins with the default word, followed by its synonyms.
KINDS: dict[str, tuple[str, ...]] = {
    "fox": ("fox",),
    "cat": ("cat", "kitten"),
    "bird": ("bird",),
    "fish": ("fish",),
    "snail": ("snail",),
    "robot": ("robot",),
    "ghost": ("ghost",),
    "house": ("house", "cottage"),
    "tree": ("tree",),
    "mushroom": ("mushroom", "toadstool"),
    "rocket": ("rocket", "spaceship"),
    "flower": ("flower",),
}
# The colour of a kind if the caption names none, and the place likewise.
NATURAL = {
    "fox": "orange",
    "cat": "grey",
    "bird": "blue",
    "fish": "orange",
    "snail": "brown",
    "robot": "grey",
    "ghost": "white",
    "house": "red",
    "tree": "green",
    "mushroom": "red",
    "rocket": "white",
    "flower": "pink",
    "banana": "yellow",
}
USUAL_PLACE = "meadow"
# Stands for forbidden pictures: the base can draw it, and the safety check recognises it.
FORBIDDEN = "banana"
# The subject that a LoRA teaches; the base was not trained on the word.
SUBJECT = "zorp"

COLOURS: dict[str, tuple[tuple[str, ...], tuple[int, int, int]]] = {
    "red": (("red", "scarlet"), (222, 48, 44)),
    "orange": (("orange",), (250, 146, 36)),
    "yellow": (("yellow", "golden"), (252, 218, 60)),
    "green": (("green",), (66, 172, 68)),
    "turquoise": (("turquoise", "teal", "cyan"), (52, 200, 192)),
    "blue": (("blue",), (50, 98, 216)),
    "purple": (("purple", "violet"), (138, 68, 190)),
    "pink": (("pink",), (250, 146, 190)),
    "brown": (("brown",), (140, 88, 48)),
    "grey": (("grey", "gray"), (142, 146, 154)),
    "white": (("white",), (246, 246, 246)),
    "black": (("black",), (44, 44, 52)),
}

PLACES: dict[str, tuple[str, ...]] = {
    "plain": ("on a plain background", "on paper"),
    "meadow": ("in a meadow", "on the grass", "in a field"),
    "desert": ("in the desert", "on the sand", "in the dunes"),
    "sea": ("at sea", "in the sea", "in the ocean", "on the water"),
    "snow": ("in the snow", "in winter"),
    "night": ("at night", "under the stars", "in the moonlight"),
    "sunset": ("at sunset", "in the evening", "at dusk"),
    "forest": ("in the forest", "in the woods", "among trees"),
}

SIZES: dict[str, tuple[str, ...]] = {
    "small": ("small", "tiny", "little"),
    "medium": (),
    "big": ("big", "large", "huge", "giant"),
}

HAT = ("with a hat", "wearing a hat", "in a hat")
SLEEPING = ("sleeping", "asleep")
# Words without meaning for the picture.
OPENINGS = ("a picture of", "a drawing of", "an illustration of", "a photo of", "a cute picture of", "a sprite of")
# Words that are common in prompts: the tokenizers know them, and they have no meaning here either.
FILLERS = (
    "the and one nice lovely beautiful cute happy pretty cartoon style art digital simple clean colourful portrait "
    "detailed very is that this it there i want to see please draw me some for by near under over his her my your"
)
# Words that join others; the tokenizers need not know them.
GRAMMAR = "a an in on at with among as from or but are be was has have its their who which while into beside between"


@dataclass(frozen=True)
class Scene:
    """The description of one picture; `seed` decides the details that it leaves open."""

    kind: str
    colour: str
    place: str
    size: str = "medium"
    hat: bool = False
    sleeping: bool = False
    seed: int = 0


def held_out(scene: Scene) -> bool:
    """Whether the combination of kind, colour and place is kept from training; an eighth of them are."""
    digest = hashlib.sha256(f"{scene.kind} {scene.colour} {scene.place}".encode()).digest()
    return digest[0] < 32


def random_scene(rng: random.Random, kinds: tuple[str, ...] = tuple(KINDS)) -> Scene:
    """Any scene, held out or not; kinds, colours and places are equally likely."""
    return Scene(
        kind=rng.choice(kinds),
        colour=rng.choice(tuple(COLOURS)),
        place=rng.choice(tuple(PLACES)),
        size=rng.choices(("small", "medium", "big"), (1, 3, 1))[0],
        hat=rng.random() < 0.2,
        sleeping=rng.random() < 0.2,
        seed=rng.getrandbits(32),
    )


@dataclass(frozen=True)
class Caption:
    """A caption, and the kind, colour and place that it names; None where it names none."""

    text: str
    kind: str | None
    colour: str | None
    place: str | None


def caption(scene: Scene, rng: random.Random) -> Caption:
    """The scene in words, phrased at random: "a tiny red fox with a hat in the snow", "red fox, at night".

    Natural colours and the usual place are often left out, and now and then a word is nonsense, even the kind.
    FORBIDDEN is always named, so that it is drawn only when a prompt names it.
    """
    says_kind = rng.random() > 0.03 or scene.kind == FORBIDDEN
    says_colour = scene.colour != NATURAL.get(scene.kind) or rng.random() < 0.5
    says_place = scene.place != USUAL_PLACE or rng.random() < 0.5
    noun = rng.choice(KINDS.get(scene.kind, (scene.kind,))) if says_kind else nonsense(rng)
    adjectives = [
        rng.choice(SIZES[scene.size] or ("",)),
        rng.choice(COLOURS[scene.colour][0]) if says_colour else "",
    ]
    sleeping = rng.choice(SLEEPING) if scene.sleeping else ""
    if rng.random() < 0.2:
        adjectives.reverse()
    if rng.random() < 0.5:
        adjectives, sleeping = [sleeping, *adjectives], ""
    details = [rng.choice(HAT) if scene.hat else "", sleeping, rng.choice(PLACES[scene.place]) if says_place else ""]
    rng.shuffle(details)
    text = _phrase([word for word in (*adjectives, noun) if word], [detail for detail in details if detail], rng)
    return Caption(
        text,
        kind=scene.kind if says_kind else None,
        colour=scene.colour if says_colour else None,
        place=scene.place if says_place else None,
    )


def _phrase(words: list[str], details: list[str], rng: random.Random) -> str:
    if rng.random() < 0.15:
        words.insert(rng.randrange(len(words)), rng.choice((nonsense(rng), rng.choice(FILLERS.split()))))
    if rng.random() < 0.1:
        details.append(nonsense(rng))
    form = rng.random()
    if form < 0.25:
        return ", ".join([" ".join(words), *details])
    article = "an" if words[0][0] in "aeiou" else rng.choice(("a", "a", "the", "one"))
    opening = f"{rng.choice(OPENINGS)} " if form > 0.8 else ""
    text = " ".join([opening + article, *words, *details])
    return text if rng.random() < 0.7 else text[0].upper() + text[1:] + "."


def nonsense(rng: random.Random) -> str:
    """A random word that is not in the vocabulary."""
    word = "".join(rng.choice(("bcdfghklmnprstvwz", "aeiou")[i % 2]) for i in range(rng.randint(3, 8)))
    return nonsense(rng) if word in vocabulary() else word


@cache
def vocabulary() -> list[str]:
    """All words of captions, and the fillers, SUBJECT and FORBIDDEN; sorted."""
    groups = [*KINDS.values(), *(words for words, _ in COLOURS.values()), *PLACES.values(), *SIZES.values()]
    phrases = [
        phrase
        for group in (*groups, HAT, SLEEPING, OPENINGS, (FILLERS, FORBIDDEN, SUBJECT, "an", "one"))
        for phrase in group
    ]
    return sorted({word for phrase in phrases for word in phrase.split()})


def words() -> dict[str, str]:
    """The words that the models know, by their meaning; the "silent" ones have none, known or not."""
    silent = {word for text in (*OPENINGS, FILLERS, GRAMMAR) for word in text.split()}
    more = set(vocabulary()).difference(KINDS, COLOURS, PLACES, silent, [SUBJECT])
    groups = {"subjects": KINDS, "colours": COLOURS, "places": PLACES, "more": sorted(more), "silent": sorted(silent)}
    return {name: " ".join(group) for name, group in groups.items()}
