"""Pictures of how a mixture's tokens are spread over its experts: heat maps, as arrays of colours and as SVG.

Shape legend: L layers with a mixture, R rows and C columns of a layer's band.
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence
from xml.sax.saxutils import escape

import numpy as np

WIDEST, HIGHEST = 900, 1200  # of a map, in pixels, as long as a cell has one
LARGEST_CELL = 18
GAP = 2  # pixels between layers
CLIP = 3.0  # log2 of the load from which a colour is at its deepest
IDLE, EVEN, BUSY = (33, 80, 150), (247, 247, 247), (165, 25, 35)
LEFT, TOP, LINE = 110, 62, 16
FONT = "font-family='Inter, Helvetica, Arial, sans-serif'"


def heat_map(loads_LRC: np.ndarray) -> np.ndarray:
    """Colour loads, 1 for an even one: (height, width, 3) uint8. Each layer is a band; white is even, blue idle, red busy.

    A colour is at its deepest from an eighth, or from eight times, an even load.
    """
    depth_LRC = np.clip(np.log2(np.maximum(loads_LRC, 2.0**-CLIP)) / CLIP, -1, 1)[..., None]
    even, ends = np.array(EVEN, float), np.where(depth_LRC < 0, np.array(IDLE, float), np.array(BUSY, float))
    colours = np.rint(even + np.abs(depth_LRC) * (ends - even)).astype(np.uint8)
    layers, rows, columns = loads_LRC.shape
    height = min(LARGEST_CELL, max(1, HIGHEST // (layers * rows)))
    width = min(LARGEST_CELL, max(1, WIDEST // columns))
    bands = colours.repeat(height, axis=1).repeat(width, axis=2)
    gap = np.full((GAP, columns * width, 3), 255, np.uint8)
    return np.concatenate([part for band in bands for part in (band, gap)][:-1])


def png(picture: np.ndarray) -> bytes:
    """Encode (height, width, 3) uint8 as PNG (W3C recommendation, third edition: 8-bit RGB, no filter)."""
    height, width, _ = picture.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), picture.reshape(height, -1)], axis=1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows.tobytes())) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def heat_map_svg(
    loads_LRC: np.ndarray, *, title: str, layers: Sequence[int], rows: Sequence[str], ends: tuple[str, str]
) -> str:
    """Draw the heat map with its labels. rows: names of a band's rows, or () for none; ends: of the horizontal axis."""
    picture = heat_map(loads_LRC)
    height, width, _ = picture.shape
    band = (height + GAP) / len(layers)
    full_width, full_height = max(LEFT + width + 20, 520), TOP + height + 64
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {full_width} {full_height}' "
        f"width='{full_width}' height='{full_height}'>",
        "<rect width='100%' height='100%' fill='white'/>",
        _text(20, 30, title, size=17),
        f"<image x='{LEFT}' y='{TOP}' width='{width}' height='{height}' style='image-rendering:pixelated' "
        f"href='data:image/png;base64,{base64.b64encode(png(picture)).decode()}'/>",
        _text(LEFT, TOP + height + 18, ends[0]),
        _text(LEFT + width, TOP + height + 18, ends[1], anchor="end"),
    ]
    stride = max(1, round(LINE / band))  # leave out names that would lie on one another
    for number, layer in enumerate(layers):
        top = TOP + number * band
        if rows and band >= LINE * len(rows):
            step = (band - GAP) / len(rows)
            parts += [
                _text(LEFT - 8, top + (row + 0.5) * step + 4, f"{layer} {name}", anchor="end") for row, name in enumerate(rows)
            ]
        elif number % stride == 0:
            parts.append(_text(LEFT - 8, top + (band - GAP) / 2 + 4, f"layer {layer}", anchor="end"))
    parts += _legend(TOP + height + 32)
    return "\n".join([*parts, "</svg>\n"])


def _legend(y: float) -> list[str]:
    steps = [2.0 ** (CLIP * number / 8) for number in range(-8, 9)]
    colours = heat_map(np.array(steps).reshape(1, 1, -1))[0, :: min(LARGEST_CELL, WIDEST // len(steps))]
    parts = [
        f"<rect x='{LEFT + 12 * number}' y='{y}' width='12' height='12' fill='rgb({red},{green},{blue})'/>"
        for number, (red, green, blue) in enumerate(colours)
    ]
    return [*parts, _text(LEFT + 12 * len(steps) + 8, y + 10.5, "load: an eighth of an even one · even · eight times")]


def _text(x: float, y: float, words: str, *, size: int = 12, anchor: str = "start") -> str:
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' {FONT} font-size='{size}' fill='#1f2937' text-anchor='{anchor}'>{escape(words)}</text>"
    )
