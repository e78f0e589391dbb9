"""Writing a feature store: whole shards, each recorded after its bytes are safe, published in one step.

A writer works in a scratch folder named by its caller after everything that decides the content:

    <scratch>/store.zarr      the store, at full size, filled shard by shard
    <scratch>/shards.jsonl    one line per finished shard, with the SHA-256 of each of its files
    <scratch>/lock            held while a writer lives
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import zarr

from cache.durable import building, publish, sync_file, sync_folder
from cache.schema import CONTRACT, Layout, StoreError, consolidate, create, put_array


class Writer:
    """Fills one store; opened again after a kill it goes on at the first missing shard.

    Raises:
        StoreError: another writer that is still alive holds the scratch folder.
    """

    def __init__(self, scratch: Path, layout: Layout):
        self.scratch, self.layout = Path(scratch), layout
        self._store, self._log = self.scratch / "store.zarr", self.scratch / "shards.jsonl"
        self.scratch.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.scratch / "lock", "w")  # noqa: SIM115  held for the writer's life
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreError(
                f"Another process is writing {self.scratch}. Wait for it to end, or end it, and run again."
            ) from None
        self._done = self._recover()
        self._root = zarr.open_group(self._store, mode="r+", use_consolidated=False)

    def pending(self) -> list[int]:
        """Shards still to be written, in order."""
        return [shard for shard in range(self.layout.shards) if shard not in self._done]

    def write(self, shard: int, values: Mapping[str, np.ndarray]) -> None:
        """Write one whole shard of every array, make it durable, and record it.

        Args:
            values: float arrays (rows of the shard, …) by array path, as `Layout.arrays` lists them.

        Raises:
            StoreError: an array is missing or of the wrong length, or a value is too large for the dtype.
        """
        rows = self.layout.rows(shard)
        if set(values) != set(self.layout.arrays()):
            raise StoreError(f"Shard {shard} has arrays {sorted(values)}; wanted {sorted(self.layout.arrays())}.")
        digests = {}
        for name, array in values.items():
            if len(array) != rows.stop - rows.start:
                raise StoreError(f"Shard {shard} of {name} has {len(array)} samples, not {rows.stop - rows.start}.")
            self._root[name][rows] = _narrow(array, self.layout.dtype, name)
            path = self._shard_file(name, shard)
            sync_file(path)
            sync_folder(path.parent)
            digests[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        with open(self._log, "a") as log:
            log.write(json.dumps({"shard": shard, "sha256": digests}, sort_keys=True) + "\n")
            log.flush()
            os.fsync(log.fileno())
        self._done[shard] = digests

    def finish(self, final: Path, provenance: Mapping) -> str:
        """Add training statistics and provenance, mark the store complete, and publish it at `final`.

        Returns:
            The SHA-256 of the content: of every shard and of the provenance.

        Raises:
            StoreError: shards are missing.
        """
        if self.pending():
            raise StoreError(f"Shards {self.pending()[:5]} of {self.scratch} are not written yet.")
        for index in range(len(self.layout.levels)):
            group = self._root[f"level{index}"]
            for name, values in zip(
                ("mean", "std"), self._training_statistics(f"level{index}/features"), strict=True
            ):
                if name in group:
                    del group[name]
                put_array(group, name, values, ("channel",))
        described = {"contract": CONTRACT, **provenance}
        content = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
        for shard in range(self.layout.shards):
            content.update(json.dumps(self._done[shard], sort_keys=True).encode())
        self._root.attrs.update(
            {**described, "content_sha256": content.hexdigest(), "coordinates": "split", "complete": True}
        )
        consolidate(self._root)
        publish(self._store, final)
        self._lock.close()
        shutil.rmtree(self.scratch)
        return content.hexdigest()

    def _recover(self) -> dict[int, dict]:
        """Finished shards of an earlier run; a torn last line and `.partial` files are cleared away."""
        done, whole = {}, ""
        if (self._store / "zarr.json").exists() and self._log.exists():
            for line in self._log.read_text().splitlines(keepends=True):
                if not line.endswith("\n"):
                    break
                record = json.loads(line)
                done[record["shard"]] = record["sha256"]
                whole += line
            self._log.write_text(whole)
            for torn in self._store.rglob("*.partial"):
                torn.unlink()
        else:
            shutil.rmtree(self._store, ignore_errors=True)
            self._log.unlink(missing_ok=True)
            create(self._store, self.layout)
            self._log.touch()
        return done

    def _shard_file(self, name: str, shard: int) -> Path:
        ndim = self._root[name].ndim
        return self._store.joinpath(name, "c", str(shard), *["0"] * (ndim - 1))

    def _training_statistics(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation per channel over the training split, in float64, shard by shard."""
        training = np.array(self.layout.split) == "train"
        count, total, squares = 0, 0.0, 0.0
        for shard in range(self.layout.shards):
            rows = self.layout.rows(shard)
            values = self._root[name][rows][training[rows]].astype(np.float64)
            count += values.size // values.shape[1]
            total = total + values.sum(axis=(0, 2, 3))
            squares = squares + np.square(values).sum(axis=(0, 2, 3))
        mean = total / count
        return mean, np.sqrt(np.maximum(squares / count - mean**2, 0))


def write_left_out(final: Path, scratch: Path, reason: str) -> None:
    """An empty store that says why it is empty: the backbone cannot see this dataset."""
    with building(scratch, final):
        root = zarr.open_group(scratch, mode="w", zarr_format=3)
        root.attrs.update({"contract": CONTRACT, "left_out": reason, "complete": True})
        consolidate(root)


def _narrow(values: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """Values in the store's dtype; infinities and NaN pass, finite values that do not fit are refused.

    So are values so small that most of them would lose their digits: below the dtype's smallest normal number.
    """
    with np.errstate(over="ignore"):
        narrow = np.asarray(values).astype(dtype)
    lost = np.isinf(narrow) & np.isfinite(values)
    if lost.any():
        raise StoreError(
            f"{int(lost.sum())} values of {name} are too large for {dtype} (up to {np.abs(values[lost]).max():.4g}, "
            f"limit {np.finfo(dtype).max:.5g}). Store this backbone with extract.dtype: float32."
        )
    size = np.abs(values[np.isfinite(values) & (values != 0)])
    if size.size and (size < np.finfo(dtype).tiny).mean() > 0.5:
        raise StoreError(
            f"Most values of {name} are too small for {dtype} (median {np.median(size):.2g}, smallest normal number "
            f"{np.finfo(dtype).tiny:.2g}) and would be lost. Store this backbone with extract.dtype: float32."
        )
    return narrow
