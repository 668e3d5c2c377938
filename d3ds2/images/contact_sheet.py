"""One picture of many: rows of pictures with headings and captions."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MARGIN = 4  # pixels
TEXT_HEIGHT = 18  # pixels of a line
INK = (40, 40, 40)


def contact_sheet(
    rows: Sequence[Sequence],
    labels: Sequence[str] = (),
    captions: Sequence[str | Sequence[str]] = (),
    cell: int = 256,
) -> Image.Image:
    """Lay out pictures as a table on white, and return it as an RGB image.

    Args:
        rows: one sequence of pictures per row; a picture is a PIL image or an (H,W,3 or 4) uint8 array with straight
            alpha, or None for an empty place. Each is fitted into `cell` x `cell` pixels.
        labels: a heading for each column, or none at all.
        captions: a text under each row, or several that share its width evenly; or none at all.
        cell: pixels.

    Raises:
        ValueError: there is no picture, the number of labels or captions does not match, or cell is below 1.
    """
    columns = max((len(row) for row in rows), default=0)
    if columns == 0:
        raise ValueError("expected at least one picture, got none")
    if labels and len(labels) != columns:
        raise ValueError(f"expected {columns} labels, one for each column, got {len(labels)}")
    if captions and len(captions) != len(rows):
        raise ValueError(f"expected {len(rows)} captions, one for each row, got {len(captions)}")
    if cell < 1:
        raise ValueError(f"expected cell >= 1 pixel, got {cell}")

    step = cell + MARGIN
    heading = TEXT_HEIGHT if labels else 0
    row_step = step + (TEXT_HEIGHT if captions else 0)
    sheet = Image.new("RGB", (columns * step + MARGIN, heading + len(rows) * row_step + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(TEXT_HEIGHT - 6)
    for column, label in enumerate(labels):
        draw.text((MARGIN + column * step + cell / 2, heading / 2 + 1), label, INK, font, anchor="mm")
    for index, row in enumerate(rows):
        top = heading + MARGIN + index * row_step
        for column, picture in enumerate(row):
            if picture is not None:
                _paste(sheet, picture, MARGIN + column * step, top, cell)
        if captions:
            caption = captions[index]
            texts = [caption] if isinstance(caption, str) else caption
            for place, text in enumerate(texts):
                left = MARGIN + place * columns * step / len(texts)
                draw.text((left, top + cell + TEXT_HEIGHT / 2), text, INK, font, anchor="lm")
    return sheet


def _paste(sheet: Image.Image, picture, left: int, top: int, cell: int) -> None:
    picture = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    picture = picture.convert("RGBA")
    on_white = Image.new("RGBA", picture.size, "white")
    on_white.alpha_composite(picture)
    scale = cell / max(picture.size)
    width, height = (max(1, round(edge * scale)) for edge in picture.size)
    fitted = on_white.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    sheet.paste(fitted, (left + (cell - width) // 2, top + (cell - height) // 2))
