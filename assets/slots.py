"""Draws slots.png: what the encoder sees, what the decoder gets and where the loss is, for the five methods.

    python assets/slots.py

The mask ratio is each method's own, the image 6 x 6 patches of a drawn face.
"""

import pathlib
import sys

import numpy as np
from PIL import Image, ImageDraw, ImageFont

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import data  # noqa: E402
import model  # noqa: E402

GRID, SIDE, GAP, LEFT, TOP = 6, 168, 22, 150, 70                              # patches, then pixels
GREY, GREEN, ORANGE = (200, 200, 200), (0, 158, 115), (230, 159, 0)
COLUMNS = {  # method: title, what the decoder gets at masked positions, what the loss there is
    'dit': ('DiT', 'all encoder tokens', 'clean, all tokens'),
    'maskdit': ('MaskDiT', '+ one mask token', 'clean; masked: noisy'),
    'mdt': ('MDT', '+ interpolated tokens', 'clean, all; twice'),
    'sddit': ('SD-DiT', '+ the noisy patches', 'clean, all; + teacher'),
    'mcdit': ('MC-DiT', '+ the clean patches', 'clean; masked: noisy'),
}

rng = np.random.default_rng(3)
at = (np.arange(SIDE) + 0.5) / SIDE * 2 - 1
inside = data.SHAPES['face'](*np.meshgrid(at / 0.85, at / 0.85))[..., None]
clean = np.where(inside, [255, 205, 70], [70, 110, 190]).astype(float)
noisy = clean + 70 * rng.standard_normal(clean.shape)
order, step = rng.permutation(GRID ** 2), SIDE // GRID


def patches(masked):
    """(row, column, slice of the pixels) of the masked patches."""
    for k in masked:
        row, column = divmod(int(k), GRID)
        yield row, column, np.s_[row * step:(row + 1) * step, column * step:(column + 1) * step]


def nearby(row, column, visible):
    """The mean colour of visible patches, near ones first: a stand-in for MDT's side block."""
    near = [(np.exp(-(row - r) ** 2 - (column - c) ** 2), noisy[at].mean((0, 1)))
            for r, c, at in patches(visible)]
    return sum(weight * colour for weight, colour in near) / sum(weight for weight, _ in near)


def panels(name):
    """The three images (SIDE, SIDE, 3) of a method."""
    method = model.METHODS[name]
    K = int(GRID ** 2 * (1 - method.mask_ratio) + 1e-9)
    visible, masked = order[:K], order[K:]
    encoder, decoder, loss = noisy.copy(), noisy.copy(), 0.35 * clean + 0.65 * np.array(GREEN)
    for row, column, at in patches(masked):
        encoder[at] = 255
        if method.fill == 'token':
            decoder[at] = GREY
        elif method.fill == 'side':
            decoder[at] = nearby(row, column, visible)
        elif method.context:
            decoder[at] = clean[at]
        if name in ('maskdit', 'mcdit'):                                      # eq. 9: the noisy image
            loss[at] = 0.35 * noisy[at] + 0.65 * np.array(ORANGE)
    return encoder, decoder, loss, masked


sheet = Image.new('RGB', (LEFT + len(COLUMNS) * (SIDE + GAP), TOP + 3 * (SIDE + 2 * GAP)), 'white')
pen, font, small = ImageDraw.Draw(sheet), ImageFont.load_default(20), ImageFont.load_default(15)
for row, title in enumerate(('the encoder\nsees', 'the decoder\ngets', 'the loss\ncompares with')):
    pen.text((8, TOP + row * (SIDE + 2 * GAP) + SIDE // 2 - 22), title, 'black', font)
for column, (name, (title, fills, targets)) in enumerate(COLUMNS.items()):
    left, (*images, masked) = LEFT + column * (SIDE + GAP), panels(name)
    colour = data.COLOURS[list(model.METHODS).index(name)]
    ratio = f'{model.METHODS[name].mask_ratio:.0%} masked' if len(masked) else 'nothing masked'
    pen.text((left, 8), title, colour, ImageFont.load_default(26))
    pen.text((left, 42), ratio, 'black', small)
    for row, (image, words) in enumerate(zip(images, ('visible noisy patches', fills, targets))):
        top = TOP + row * (SIDE + 2 * GAP)
        sheet.paste(Image.fromarray(image.clip(0, 255).astype(np.uint8)), (left, top))
        for k in range(GRID + 1):
            pen.line([(left + k * step, top), (left + k * step, top + SIDE)], (255, 255, 255), 1)
            pen.line([(left, top + k * step), (left + SIDE, top + k * step)], (255, 255, 255), 1)
        for r, c, _ in patches(masked) if row < 2 else ():
            pen.rectangle([left + c * step, top + r * step, left + (c + 1) * step, top + (r + 1) * step],
                          outline=(213, 94, 0), width=2)
        pen.text((left, top + SIDE + 6), words, 'black', small)
sheet.save(HERE / 'slots.png')
