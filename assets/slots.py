"""Draws slots.png: what the five methods put into a masked slot before the decoder.

python assets/slots.py
"""

import pathlib
import sys

import numpy as np
from PIL import Image, ImageDraw, ImageFont

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import data  # noqa: E402

SIDE, GRID, GAP = 150, 5, 22  # pixels of a panel, patches a side, pixels between panels
VISIBLE, MASKED = (60, 60, 60), (220, 60, 40)
PANELS = [
    ('clean image', '', None),
    ('DiT', 'nothing is masked', 'none'),
    ('MaskDiT', 'one learned token', 'token'),
    ('MDT', 'interpolated tokens', 'side'),
    ('SD-DiT', 'the noisy patch', 'noisy'),
    ('MC-DiT', 'the clean patch', 'clean'),
]

rng = np.random.default_rng(3)
at = (np.arange(SIDE) + 0.5) / SIDE * 2 - 1
inside = data.SHAPES['face'](*np.meshgrid(at / 0.85, at / 0.85))[..., None]
clean = np.where(inside, [255, 205, 70], [70, 110, 190]).astype(float)
noisy = clean + 70 * rng.standard_normal(clean.shape)
masked = rng.permutation(GRID * GRID).reshape(GRID, GRID) < GRID * GRID // 2
cells = [(row, column) for row in range(GRID) for column in range(GRID)]
size = SIDE // GRID


def patch(picture, row, column):
    return picture[row * size : (row + 1) * size, column * size : (column + 1) * size]


def nearby(row, column):
    """The mean colour of the visible patches, near ones first: a stand-in for MDT's side-interpolater."""
    near = [
        (np.exp(-((row - r) ** 2) - (column - c) ** 2), patch(noisy, r, c).mean((0, 1)))
        for r, c in cells
        if not masked[r, c]
    ]
    return sum(weight * colour for weight, colour in near) / sum(weight for weight, _ in near)


def panel(fill):
    picture = clean.copy() if fill is None else noisy.copy()
    for row, column in cells:
        if fill in ('token', 'side', 'clean') and masked[row, column]:
            patch(picture, row, column)[:] = {
                'token': lambda: 150,
                'side': lambda: nearby(row, column),
                'clean': lambda: patch(clean, row, column),
            }[fill]()
    image = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for chosen, colour, width in ((False, VISIBLE, 1), (True, MASKED, 3)):  # the masked slots' frames on top
        for row, column in cells:
            if fill is not None and (masked[row, column] and fill != 'none') == chosen:
                pen.rectangle(
                    (column * size, row * size, (column + 1) * size - 1, (row + 1) * size - 1),
                    None,
                    colour,
                    width,
                )
    return image


sheet = Image.new('RGB', (len(PANELS) * (SIDE + GAP) + GAP, SIDE + 66), 'white')
pen = ImageDraw.Draw(sheet)
for i, (title, words, fill) in enumerate(PANELS):
    left = GAP + i * (SIDE + GAP)
    sheet.paste(panel(fill), (left, 28))
    pen.text((left, 6), title, 'black', ImageFont.load_default(16))
    pen.text(
        (left, 34 + SIDE),
        words,
        MASKED if fill not in (None, 'none') else VISIBLE,
        ImageFont.load_default(14),
    )
sheet.save(HERE / 'slots.png', optimize=True)
