"""The closed world of the embedded corpus: its words, colours, sizes and answer sets. No torch, no drawing.

Every other file of `pdrop.embedded` takes its names from here, so that the tokenizer has each word that a question or
an answer can hold.
"""

from __future__ import annotations

IMAGE_SIZE = 168  # pixels, both sides
PATCH_SIZE = 14  # pixels, both sides
GRID = IMAGE_SIZE // PATCH_SIZE  # patches per side
VISUAL_TOKENS = GRID * GRID

FAMILIES = (
    "existence",
    "attribute",
    "relation",
    "position",
    "counting",
    "reading",
    "document",
    "chart",
    "choice",
    "multihop",
)

SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross", "ring", "heart")
PLURALS = {shape: shape + ("es" if shape.endswith("s") else "s") for shape in SHAPES}
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 35),
    "green": (35, 150, 50),
    "blue": (35, 70, 215),
    "yellow": (240, 215, 30),
    "orange": (245, 135, 20),
    "purple": (135, 45, 170),
    "pink": (250, 140, 190),
    "cyan": (40, 200, 215),
    "brown": (125, 75, 35),
    "black": (25, 25, 25),
}
COLOR_NAMES = tuple(COLORS)
LABELS = ("total", "date", "code", "tax", "name", "price", "room", "page")
CELLS = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
RELATIONS = ("left of", "right of", "above", "below")
OPTION_LETTERS = ("A", "B", "C", "D")

DIGITS = "0123456789"
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"  # without I and O, which some fonts draw like 1 and 0
CHARACTERS = LETTERS + DIGITS + "IO"  # I and O appear in the labels of documents only

_TEMPLATE_WORDS = """
    USER ASSISTANT : ? . , yes no is there a what color the shape object objects how many are where does sign say
    written in image read text left right above below of top bottom center value field which bar bars tallest shortest
    largest smallest taller shorter than nearest answer with letter from to next highest lowest line row column first
    last second fields object next same other please using single
    word or phrase number
"""


def words() -> list[str]:
    """Whole words of the tokenizer, sorted: all that questions, answers and prompts are made of."""
    listed = set(_TEMPLATE_WORDS.split())
    listed.update(SHAPES, PLURALS.values(), COLORS, LABELS)
    return sorted(listed)
