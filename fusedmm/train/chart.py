"""A chart as an image: daily candles drawn with NumPy, cut into patches that serve as tokens.

The picture holds nothing that the bars do not, at a coarser resolution: it is there to see whether a model that reads
pictures finds what another finds in numbers, and as an example of an image modality.
"""

import numpy as np
import numpy.typing as npt

from fusedmm.train.dataset import Float32Array

BARS = 32
BAR_WIDTH = 2
PRICE_ROWS = 24
VOLUME_ROWS = 8
PATCH = 8
HEIGHT = PRICE_ROWS + VOLUME_ROWS
WIDTH = BARS * BAR_WIDTH
UNITS = (*(f"pixel {row},{column}" for row in range(PATCH) for column in range(PATCH)), "row", "column")

Bars = npt.NDArray[np.float64]


def draw_candles(open_: Bars, high: Bars, low: Bars, close: Bars, volume: Bars) -> Float32Array:
    """Draw the last `BARS` bars of each sample.

    A candle is two pixels wide: its range at 0.4, its body at 1.0 where the close is not below the open, else at 0.7.
    The range of the window fills 24 rows; volumes, over the window's largest, fill 8 rows below.

    Args:
        open_, high, low, close, volume: [N, at least BARS] float64.

    Returns:
        [N, HEIGHT, WIDTH] float32 from 0 to 1; row 0 is the top.
    """
    open_, high, low, close, volume = (bars[:, -BARS:] for bars in (open_, high, low, close, volume))
    bottom = low.min(axis=1, keepdims=True)
    extent = np.maximum(high.max(axis=1, keepdims=True) - bottom, 1e-9)

    def row_of(price: Bars) -> npt.NDArray[np.int64]:  # [N, 1, BARS]
        rows: npt.NDArray[np.int64] = np.rint((1 - (price - bottom) / extent) * (PRICE_ROWS - 1)).astype(np.int64)
        return rows[:, None, :]

    rows = np.arange(PRICE_ROWS)[None, :, None]  # [1, PRICE_ROWS, 1] against [N, 1, BARS]
    in_range = (rows >= row_of(high)) & (rows <= row_of(low))
    in_body = (rows >= row_of(np.maximum(open_, close))) & (rows <= row_of(np.minimum(open_, close)))
    body = np.where(close >= open_, 1.0, 0.7)[:, None, :]
    candles = np.where(in_body, body, np.where(in_range, 0.4, 0.0))
    largest = np.maximum(volume.max(axis=1, keepdims=True), 1e-9)
    levels = np.rint(volume / largest * VOLUME_ROWS)[:, None, :]
    volumes = np.where(np.arange(VOLUME_ROWS, 0, -1)[None, :, None] <= levels, 0.5, 0.0)
    image: Float32Array = np.concatenate([candles, volumes], axis=1).repeat(BAR_WIDTH, axis=2).astype(np.float32)
    return image


def cut_patches(images: Float32Array) -> Float32Array:
    """Cut images into square patches of `PATCH` pixels a side, each with its place.

    Args:
        images: [N, H, W] float32, H and W multiples of `PATCH`.

    Returns:
        [N, H * W / PATCH^2, PATCH^2 + 2] float32: pixels row by row, then the patch's row and column from 0 to 1.
    """
    count, height, width = images.shape
    down, across = height // PATCH, width // PATCH
    tiles = images.reshape(count, down, PATCH, across, PATCH).transpose(0, 1, 3, 2, 4)
    pixels = tiles.reshape(count, down * across, PATCH * PATCH)
    place = np.stack(np.meshgrid(np.linspace(0, 1, down), np.linspace(0, 1, across), indexing="ij"), axis=-1)
    places = np.broadcast_to(place.reshape(1, down * across, 2), (count, down * across, 2))
    return np.concatenate([pixels, places], axis=2).astype(np.float32)
