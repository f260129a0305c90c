"""What a condition explains, as a picture: gain by noise level, and how it grew while it was learned."""
from collections.abc import Sequence

from PIL import Image, ImageDraw

from ..pictures.contact_sheets import write
from .gain import LEVELS, Check

SET, OTHERS = "#1f77b4", "#ff7f0e"


def plot(check: Check, curve: Sequence[tuple[int, float]] = (), width: int = 720, height: int = 300) -> Image.Image:
    """Left: gain by noise level, on the set and on the reference. Right: on held-out pictures of the set over the steps of learning."""
    page = Image.new("RGB", (width, height), "white")
    draw, middle = ImageDraw.Draw(page), width * 3 // 5 if len(curve) > 1 else width
    lines = [(SET, "your pictures", list(zip(LEVELS, check.set.by_level.tolist())))]
    if check.reference:
        lines.append((OTHERS, "the others", list(zip(LEVELS, check.reference.by_level.tolist()))))
    _panel(draw, (60, 40, middle - 20, height - 40), "share of the model's error taken away, by fraction of the schedule", lines)
    if len(curve) > 1:
        _panel(draw, (middle + 50, 40, width - 20, height - 40), "while learning, by step", [(SET, "held out", list(curve))])
    return page


def _panel(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], title: str, lines: Sequence[tuple[str, str, list]]) -> None:
    """Lines (colour, name, points) in a frame with a line at 0."""
    left, top, right, bottom = box
    xs, ys = ([point[i] for _, _, points in lines for point in points] for i in (0, 1))
    low, high = min(0.0, *ys), max(0.0, *ys) or 1e-6

    def at(x, y):
        return (left + (right - left) * (x - min(xs)) / (max(xs) - min(xs)), bottom - (bottom - top) * (y - low) / (high - low))

    draw.rectangle(box, outline="gray")
    draw.line([at(min(xs), 0), at(max(xs), 0)], "silver", 1)
    write(draw, (left, top - 22), title, "black", 13, width=right - left)
    for value in (low, high):
        write(draw, (left - 6, at(min(xs), value)[1]), f"{value:.0%}" if high - low > 0.1 else f"{value:.1%}", "black", 12, "rm")
    for value, anchor in ((min(xs), "la"), (max(xs), "ra")):
        write(draw, (at(value, 0)[0], bottom + 4), f"{value:g}", "black", 12, anchor)
    for row, (colour, name, points) in enumerate(lines):
        draw.line([at(*point) for point in points], colour, 3)
        write(draw, (right - 8, top + 6 + 18 * row), name, colour, 14, "ra")
