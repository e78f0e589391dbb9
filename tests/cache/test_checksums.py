"""Fingerprints of what decides a result."""

import subprocess
import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
import pytest

from cache.checksums import fingerprint


class Color(StrEnum):
    RED = "red"


@dataclass(frozen=True)
class Config:
    path: Path
    names: tuple[str, ...]


EQUAL = [
    ({"inner": Config(Path("a/b"), ("x", "y"))}, {"inner": {"path": "a/b", "names": ["x", "y"]}}),
    ({"x": 1, "y": 2}, {"y": 2, "x": 1}), ((1, 2), [1, 2]), ({"b", "a"}, ["a", "b"]), (Color.RED, "red"),
    (np.float64(0.5), 0.5), (np.arange(3), [0, 1, 2]),
]  # fmt: skip
DIFFERENT = [
    ((1, 2), (2, 1)), (([1], 2), ([1, 2],)), (("ab", "c"), ("a", "bc")), ((1,), ("1",)), ((None,), ("null",)),
    ((0.1,), (0.1 + 1e-16,)), ((b"x",), (b"y",)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("a", "b", "is_equal"), [((a,), (b,), True) for a, b in EQUAL] + [(*pair, False) for pair in DIFFERENT]
)
def test_fingerprint_is_equal_for_equal_values_only(a, b, is_equal):
    assert (fingerprint(*a) == fingerprint(*b)) == is_equal


def test_fingerprint_is_the_same_in_another_process():
    code = "from cache.checksums import fingerprint; print(fingerprint({'b', 'a', 'c'}, {'x': (1, 2.5)}))"
    output = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=Path(__file__).parents[2])
    assert output.strip() == fingerprint({"a", "b", "c"}, {"x": [1, 2.5]})


@pytest.mark.parametrize("value", [object(), lambda: None, Config])
def test_fingerprint_of_a_value_without_canonical_text_fails(value):
    with pytest.raises(TypeError):
        fingerprint({"key": [value]})
