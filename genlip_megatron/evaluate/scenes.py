"""The vocabulary of the rendered demo scenes, shared by the renderer and the scorer."""

COLOURS = {
    "red": (215, 25, 28),
    "green": (20, 150, 40),
    "blue": (30, 60, 220),
    "yellow": (250, 215, 0),
    "purple": (140, 30, 170),
    "black": (15, 15, 15),
}
SHAPES = ("circle", "square", "triangle", "cross")
COUNTS = ("one", "two", "three", "four")
POSITIONS = ("top left", "top right", "bottom left", "bottom right")
WORDS = ("sun", "moon", "fish", "bird", "tree", "ship", "lamp", "gold")
ATTRIBUTES = ("colour", "shape", "count", "position", "word")

TEMPLATES = (
    "{count} {colour} {shape} at the {position}. The word says {word}.",
    "The word {word} with {count} {colour} {shape} at the {position}.",
    "At the {position} there is a group of {count} {colour} {shape}. It reads {word}.",
)


def plural(shape: str, count: str) -> str:
    """The shape's name in the number that fits its count.

    >>> plural("cross", "two"), plural("circle", "one")
    ('crosses', 'circle')
    """
    if count == "one":
        return shape
    return shape + ("es" if shape.endswith("s") else "s")


def describe(attributes: dict[str, str], template: int) -> str:
    """The caption of a scene."""
    shape = plural(attributes["shape"], attributes["count"])
    caption = TEMPLATES[template].format(**{**attributes, "shape": shape})
    return caption[0].upper() + caption[1:]
