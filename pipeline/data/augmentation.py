"""Augmented copies of an image: the eight symmetries of a square.

Each view is encoded by the backbone itself: turning cached features is not the same as features of a turned image.
"""

from collections.abc import Callable

import numpy as np

# On arrays (…, y, x) with y downwards; `rot90` is a quarter turn anticlockwise as seen.
VIEWS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "identity": lambda image: image,
    "flip_x": lambda image: image[..., ::-1],
    "flip_y": lambda image: image[..., ::-1, :],
    "rot90": lambda image: np.rot90(image, 1, axes=(-2, -1)),
    "rot180": lambda image: np.rot90(image, 2, axes=(-2, -1)),
    "rot270": lambda image: np.rot90(image, 3, axes=(-2, -1)),
    "transpose": lambda image: np.swapaxes(image, -2, -1),
    "antitranspose": lambda image: np.rot90(np.swapaxes(image, -2, -1), 2, axes=(-2, -1)),
}
