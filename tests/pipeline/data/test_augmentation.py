"""The eight symmetries of a square."""

import numpy as np

from pipeline.data.augmentation import VIEWS


def test_they_are_eight_and_each_is_what_its_name_says():
    image = np.arange(12).reshape(1, 3, 4)[..., :3]
    seen = {name: turn(image) for name, turn in VIEWS.items()}
    assert len({values.tobytes() for values in map(np.ascontiguousarray, seen.values())}) == 8
    top_right = image[0, 0, 2]
    corners = {"identity": (0, 2), "flip_x": (0, 0), "flip_y": (2, 2), "rot90": (0, 0), "rot180": (2, 0),
               "rot270": (2, 2), "transpose": (2, 0), "antitranspose": (0, 2)}  # fmt: skip
    for name, place in corners.items():
        assert seen[name][0][place] == top_right, name
    np.testing.assert_array_equal(seen["rot90"][0], np.rot90(image[0]))
    np.testing.assert_array_equal(seen["transpose"][0], image[0].T)
