"""Fingerprints of what decides a result."""

import subprocess
import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
import pytest

from cache.checksums import fingerprint

ROOT = Path(__file__).parents[2]


class Color(StrEnum):
    RED = "red"


@dataclass(frozen=True)
class Config:
    path: Path
    names: tuple[str, ...]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ({"inner": Config(Path("a/b"), ("x", "y"))}, {"inner": {"path": "a/b", "names": ["x", "y"]}}),
        ({"x": 1, "y": 2}, {"y": 2, "x": 1}),
        ((1, 2), [1, 2]),
        ({"b", "a"}, ["a", "b"]),
        (Color.RED, "red"),
        (np.float64(0.5), 0.5),
        (np.arange(3), [0, 1, 2]),
    ],
    ids=["dataclass", "key order", "tuple", "set", "enum", "scalar", "array"],
)
def test_fingerprint_of_equal_values_is_equal(a, b):
    assert fingerprint(a) == fingerprint(b)


DIFFERENT = [
    ((1, 2), (2, 1)), (([1], 2), ([1, 2],)), (("ab", "c"), ("a", "bc")), ((1,), ("1",)), ((None,), ("null",)),
    ((0.1,), (0.1 + 1e-16,)), ((b"x",), (b"y",)),
]  # fmt: skip


@pytest.mark.parametrize(("a", "b"), DIFFERENT, ids=str)
def test_fingerprint_of_different_values_differs(a, b):
    assert fingerprint(*a) != fingerprint(*b)


def test_fingerprint_is_the_same_in_another_process():
    code = "from cache.checksums import fingerprint; print(fingerprint({'b', 'a', 'c'}, {'x': (1, 2.5)}))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert output.strip() == fingerprint({"a", "b", "c"}, {"x": [1, 2.5]})


@pytest.mark.parametrize("value", [object(), lambda: None, Config], ids=["object", "function", "class"])
def test_fingerprint_of_a_value_without_canonical_text_fails(value):
    with pytest.raises(TypeError):
        fingerprint({"key": [value]})
