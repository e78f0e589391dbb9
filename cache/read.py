"""Reading a finished feature store."""

from pathlib import Path

import numpy as np
import zarr

from cache.schema import StoreError


class Features:
    """A finished feature store, opened for reading.

    Attributes:
        sample, split: text arrays (sample,).
        levels: names of the levels, finest first.
        pooled: names of the pooled vectors, in the backbone's order.
        attributes: provenance.

    Raises:
        StoreError: nothing there, or a store whose writer did not finish.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        if not (self.path / "zarr.json").exists():
            raise StoreError(
                f"There is no feature store at {path}. Make it with: "
                f"dvc repro extract@{self.path.parent.name}-{self.path.stem}"
            )
        self._root = zarr.open_group(self.path, mode="r")
        self.attributes = dict(self._root.attrs)
        if not self.attributes.get("complete"):
            raise StoreError(f"{path} was never finished, so it is not read. Delete it and extract again.")
        if reason := self.attributes.get("left_out"):
            raise StoreError(f"{path} holds no features: {reason}")
        self.sample = np.array(self._root["sample"][:].tolist())
        self.split = np.array(self._root["split"][:].tolist())
        self.levels = sorted(name for name in self._root.group_keys() if name.startswith("level"))
        self.pooled = list(self._root["pooled"].attrs["vectors"])

    def read(self, name: str, index: np.ndarray) -> np.ndarray:
        """Rows `index` of the array `name` (such as `level0/features`), in that order, in the store's dtype.

        Whole shards are read one after another, since zarr-python is slow at scattered single rows.
        """
        array = self._root[name]
        step = (array.shards or array.chunks)[0]
        index = np.asarray(index)
        values = np.empty((len(index), *array.shape[1:]), dtype=array.dtype)
        for shard in np.unique(index // step):
            wanted = index // step == shard
            block = array[shard * step : (shard + 1) * step]
            values[wanted] = block[index[wanted] - shard * step]
        return values

    def statistics(self, level: str) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of a level's channels over the training split, float64 (channel,)."""
        return self._root[level]["mean"][:], self._root[level]["std"][:]


def aligned(stores: list[Features]) -> None:
    """Check that stores hold the same samples in the same order with the same splits.

    Raises:
        StoreError: naming the two stores and the first difference.
    """
    first = stores[0]
    for other in stores[1:]:
        for what in ("sample", "split"):
            ours, theirs = getattr(first, what), getattr(other, what)
            if len(ours) != len(theirs):
                raise StoreError(f"{first.path} has {len(ours)} samples, {other.path} has {len(theirs)}.")
            if (ours != theirs).any():
                row = int(np.argmax(ours != theirs))
                raise StoreError(
                    f"{first.path} and {other.path} differ in '{what}' at row {row}: '{ours[row]}' and "
                    f"'{theirs[row]}'. Both must come from one images store: extract again."
                )
