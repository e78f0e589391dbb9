"""Storage formats of a level's maps: plain, compressed, or with digits removed to save space.

`none` is the default and the fastest to read. `lz4` and `zstd` (Blosc with byte shuffle) are lossless. `bitround<k>`
keeps k bits of the mantissa and then compresses with zstd (Klöwer et al. 2021, doi:10.1038/s43588-021-00156-2);
readers get ordinary floats. `int8` stores each channel of each map as 8-bit integers and a `scale`.
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
_MANTISSA_BITS = {"float16": 10, "float32": 23}


@dataclass(frozen=True)
class Codec:
    """Storage format of a level.

    Attributes:
        name: `none`, `lz4`, `zstd`, `bitround` or `int8`.
        keepbits: mantissa bits that `bitround` keeps.
    """

    name: str
    keepbits: int = 0

    @property
    def has_scale(self) -> bool:
        """Whether the store has an array `scale` for the features."""
        return self.name == "int8"

    @property
    def is_lossy(self) -> bool:
        """Whether the values that are read differ from those written."""
        return self.name in ("bitround", "int8")

    @property
    def label(self) -> str:
        """The name that `parse_codec` reads."""
        return f"bitround{self.keepbits}" if self.name == "bitround" else self.name

    def stored_dtype(self, dtype: str) -> str:
        """Return the dtype on disk of features that are read as `dtype`."""
        return "int8" if self.has_scale else dtype

    def compressor(self) -> "BloscCodec | None":
        """Return the compressor for the metadata of a Zarr array."""
        # zarr takes 0.25 s to import, and reading params.yaml needs only the names of codecs.
        from zarr.codecs import BloscCodec

        name = _COMPRESSORS.get(self.name)
        return BloscCodec(cname=name, clevel=COMPRESSION_LEVEL, shuffle="shuffle") if name else None

    def compress(self, chunk: np.ndarray) -> bytes | memoryview:
        """Return the bytes of one chunk, which is in C order."""
        if self.name not in _COMPRESSORS:
            return chunk.data.cast("B")
        # numcodecs takes 0.1 s to import, and reading params.yaml needs only the names of codecs.
        from numcodecs import blosc

        name = _COMPRESSORS[self.name].encode()
        return blosc.compress(chunk, name, COMPRESSION_LEVEL, blosc.SHUFFLE, 0, typesize=chunk.dtype.itemsize)

    def quantize(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Remove the digits that the codec does not store.

        Args:
            values: float16 or float32 (…, channel, y, x).

        Returns:
            The array to store (…, channel, y, x), and the float32 scale (…, channel) of `int8`, else None.

        Raises:
            ValueError: `int8` cannot hold the NaN or infinite values.
        """
        if self.name == "bitround":
            # numcodecs takes 0.1 s to import, and reading params.yaml needs only the names of codecs.
            from numcodecs.bitround import BitRound

            rounded = BitRound(self.keepbits).decode(BitRound(self.keepbits).encode(values.copy()))
            rounded = rounded.view(values.dtype).reshape(values.shape)
            # Rounding turns NaN into a finite value and the largest values into infinity.
            return np.where(np.isfinite(values) & np.isfinite(rounded), rounded, values), None
        if self.has_scale:
            if not np.isfinite(values).all():
                raise ValueError("NaN or infinite values, which int8 cannot hold")
            dtype_max = np.float32(np.finfo(values.dtype).max)
            # Rounded down at the end of the range, so that no value is read as infinity.
            max_scale = np.nextafter(dtype_max / np.float32(_INT8_MAX), np.float32(0))
            scale = np.minimum(
                np.abs(values).max(axis=(-2, -1)).astype(np.float32) / np.float32(_INT8_MAX), max_scale
            )
            divisor = np.where(scale > 0, scale, 1)[..., None, None]
            return np.clip(np.rint(values / divisor), -_INT8_MAX, _INT8_MAX).astype(np.int8), scale
        return values, None


NONE = Codec("none")


def parse_codec(name: str, dtype: str) -> Codec:
    """Return the codec of a name such as `zstd` or `bitround6`.

    Raises:
        ValueError: there is no such codec, or it keeps more bits than the dtype has.
    """
    bits = _MANTISSA_BITS[dtype]
    if match := re.fullmatch(r"bitround(\d+)", name):
        if 1 <= int(match[1]) <= bits:
            return Codec("bitround", int(match[1]))
        raise ValueError(f"'{name}' keeps {match[1]} bits of the mantissa; {dtype} has {bits}: bitround1 to {bits}")
    if name not in ("none", "lz4", "zstd", "int8"):
        raise ValueError(f"there is no codec '{name}'; there are none, lz4, zstd, bitround<bits kept> and int8")
    return Codec(name)


def dequantize(quantized: np.ndarray, scale: np.ndarray, out: np.ndarray) -> None:
    """Write int8 values (…, channel, y, x) times their scale (…, channel) to `out`."""
    np.multiply(quantized, scale[..., None, None], out=out, casting="unsafe")
