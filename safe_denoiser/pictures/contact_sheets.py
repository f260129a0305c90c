"""What a set looks like: contact sheets and thumbnails, blurred by default, since sets hold what people do not want to see."""
import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

from .files import blur, printable
from .negation_set import NegationSet


def write(draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, fill: str, size: int, anchor: str = "la",
          width: float = math.inf) -> None:
    """Text on a picture, cut short with an ellipsis where a line of it is wider than `width`; anchors as Pillow names them."""
    try:
        font = ImageFont.load_default(size)
    except TypeError:  # Pillow before 10.1: one small font, which knows Latin letters only and no anchors
        font, text = ImageFont.load_default(), text.encode("latin-1", "replace").decode("latin-1")
        right, lower = font.getbbox(text)[2:] if anchor != "la" else (0, 0)
        place = place[0] - {"l": 0, "m": right / 2, "r": right}[anchor[0]], place[1] - {"a": 0, "m": lower / 2, "d": lower}[anchor[1]]
        anchor = "la"
    while width < math.inf and font.getlength(text) > width:
        text = text[:-4] + "..."
    draw.text(place, text, fill, font, anchor)


def describe(negation_set: NegationSet, title: str) -> str:
    """Name, count, skipped files and size, in one line."""
    units = ("B", "KB", "MB", "GB", "TB")
    power = min(len(units) - 1, max(0, negation_set.size.bit_length() - 1) // 10)
    size = f", {negation_set.size / 1024**power:.3g} {units[power]}" if negation_set.size else ""
    what = "latents" if negation_set.latents and None not in negation_set.latents else "pictures"
    return f"{title}: {len(negation_set)} {what}, {len(negation_set.skipped)} skipped{size}"


def contact_sheet(negation_set: NegationSet, title: str = "", count: int = 16, blurred: bool = True) -> Image.Image:
    """Up to `count` pictures, evenly picked, in a grid under a line of text; blurred beyond recognition by default."""
    lines = [describe(negation_set, title), *(f"skipped {name}: {reason}" for name, reason in negation_set.skipped[:3])]
    return sheet(negation_set, evenly(range(len(negation_set)), count), lines, blurred)


def sheet(negation_set: NegationSet, rows: Sequence[int], lines: Sequence[str], blurred: bool = True,
          captions: Sequence[str] = ()) -> Image.Image:
    """These pictures in a grid under lines of text, each over its own caption, where there are captions (one per row)."""
    tile, columns, line, foot = 128, 4, 28, 20 if captions else 0
    top = line * len(lines) + 8
    page = Image.new("RGB", (tile * columns, top + (tile + foot) * -(-len(rows) // columns)), "black")
    draw = ImageDraw.Draw(page)
    for row, text in enumerate(lines):
        write(draw, (4, 2 + row * line), printable(text), "white", 22, width=page.width - 8)
    for place, i in enumerate(rows):
        corner = place % columns * tile, top + place // columns * (tile + foot)
        page.paste(thumbnail(negation_set, i, tile, blurred), corner)
        if captions:
            write(draw, (corner[0] + 2, corner[1] + tile + 1), printable(captions[place]), "white", 14, width=tile - 4)
    return page


def thumbnail(negation_set: NegationSet, i: int, tile: int, blurred: bool = True) -> Image.Image:
    """A square thumbnail of picture i of the set; `blurred` keeps 6 x 6 colours of it. An item without a picture is a grey tile."""
    if negation_set.latents and negation_set.latents[i] is not None:
        return Image.new("RGB", (tile, tile), "gray")
    pixels = blur(negation_set.readers[i]()) if blurred else negation_set.readers[i]()
    return ImageOps.fit(Image.fromarray((pixels * 255).round().byte().numpy()), (tile, tile))


def evenly(rows: Sequence[int], count: int) -> list[int]:
    """Up to `count` of these, evenly picked, in order."""
    return [rows[i * len(rows) // min(count, len(rows))] for i in range(min(count, len(rows)))]
