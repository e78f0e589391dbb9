"""How the maps of a level are stored: as they are, compressed, or with digits given up for space.

`none` is the default and the fastest to read. `lz4` and `zstd` (Blosc, byte shuffle) lose nothing. `bitround<k>`
keeps k bits of the mantissa and then compresses with zstd (Klöwer et al. 2021, doi:10.1038/s43588-021-00156-2);
any reader sees ordinary floats. `int8` stores each map's channels as 8-bit steps of their own `scale`.
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from zarr.codecs import BloscCodec

COMPRESSION_LEVEL = 5
_COMPRESSORS = {"lz4": "lz4", "zstd": "zstd", "bitround": "zstd"}
_INT8_MAX = 127


@dataclass(frozen=True)
class Codec:
    """One way of storing a level.

    Attributes:
        name: `none`, `lz4`, `zstd`, `bitround` or `int8`.
        keepbits: mantissa bits that `bitround` keeps.
    """

    name: str
    keepbits: int = 0

    @property
    def has_scale(self) -> bool:
        """The store has a `scale` beside the features."""
        return self.name == "int8"

    @property
    def is_lossy(self) -> bool:
        """Values come back changed."""
        return self.name in ("bitround", "int8")

    @property
    def label(self) -> str:
        """The name as `parse` reads it."""
        return f"bitround{self.keepbits}" if self.name == "bitround" else self.name

    def stored_dtype(self, dtype: str) -> str:
        """The dtype on disk of features whose reader gets `dtype`."""
        return "int8" if self.has_scale else dtype

    def compressor(self) -> "BloscCodec | None":
        """What the arrays' metadata says of each chunk's compression."""
        from zarr.codecs import BloscCodec

        name = _COMPRESSORS.get(self.name)
        return BloscCodec(cname=name, clevel=COMPRESSION_LEVEL, shuffle="shuffle") if name else None

    def compress(self, chunk: np.ndarray) -> bytes | memoryview:
        """The bytes of one chunk (C order)."""
        if self.name not in _COMPRESSORS:
            return chunk.data.cast("B")
        from numcodecs import blosc

        name = _COMPRESSORS[self.name].encode()
        return blosc.compress(chunk, name, COMPRESSION_LEVEL, blosc.SHUFFLE, 0, typesize=chunk.dtype.itemsize)

    def quantize(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """What is stored of `values` (…, channel, y, x): the array, and the scale (…, channel) or None.

        Raises:
            ValueError: NaN or infinite values for int8, which has no place for them.
        """
        if self.name == "bitround":
            from numcodecs.bitround import BitRound

            rounded = BitRound(self.keepbits).decode(BitRound(self.keepbits).encode(values.copy()))
            rounded = rounded.view(values.dtype).reshape(values.shape)
            # Rounding would turn NaN into a number and the largest numbers into infinity.
            return np.where(np.isfinite(values) & np.isfinite(rounded), rounded, values), None
        if self.has_scale:
            if not np.isfinite(values).all():
                raise ValueError("NaN or infinite values, which int8 cannot hold")
            largest = np.float32(np.finfo(values.dtype).max)
            # Rounded down at the end of the range, so that no value comes back as infinity.
            limit = np.nextafter(largest / np.float32(_INT8_MAX), np.float32(0))
            scale = np.minimum(np.abs(values).max(axis=(-2, -1)).astype(np.float32) / np.float32(_INT8_MAX), limit)
            steps = np.where(scale > 0, scale, 1)[..., None, None]
            return np.clip(np.rint(values / steps), -_INT8_MAX, _INT8_MAX).astype(np.int8), scale
        return values, None


NONE = Codec("none")


def parse_codec(name: str, dtype: str) -> Codec:
    """The codec of a name such as `zstd` or `bitround6`.

    Raises:
        ValueError: no such codec, or more bits than the dtype has.
    """
    bits = {"float16": 10, "float32": 23}[dtype]
    if match := re.fullmatch(r"bitround(\d+)", name):
        if 1 <= int(match[1]) <= bits:
            return Codec("bitround", int(match[1]))
        raise ValueError(f"'{name}' keeps {match[1]} bits of the mantissa; {dtype} has {bits}: bitround1 to {bits}")
    if name not in ("none", "lz4", "zstd", "int8"):
        raise ValueError(f"there is no codec '{name}'; there are none, lz4, zstd, bitround<bits kept> and int8")
    return Codec(name)


def dequantize(quantized: np.ndarray, scale: np.ndarray, out: np.ndarray) -> None:
    """int8 steps (…, channel, y, x) times their scale (…, channel), into `out`."""
    np.multiply(quantized, scale[..., None, None], out=out, casting="unsafe")
