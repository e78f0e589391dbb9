"""Write a feature store shard by shard, durably and resumably, and publish it in one step.

Any number of writers, on any number of machines, share a scratch folder. The caller must name it by
a fingerprint of everything that the content depends on.

    <scratch>/store.zarr          the store at full size, filled shard by shard
    <scratch>/shards/<k>.json     exists once shard k is on the disk: SHA-256 of its files, errors of the cast, and
                                  statistics of its training samples
    <scratch>/shards/<k>.lock     locked by the writer of shard k; the death of the writer releases it
    <scratch>/fingerprint         of the schema and the provenance, which all writers must agree on
    <scratch>/lock                locked while the store is created and while it is finished
"""

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import zarr

from cache import checksums, codecs
from cache.atomic import atomic_dir, lock_file, publish, sync_folder, write_file
from cache.codecs import NONE, CastArray, CastStats, cast_array, check_cast, dequantize
from cache.errors import StoreError
from cache.running_stats import RunningStats, block_slices
from cache.schema import (
    CONTRACT,
    StoreSchema,
    consolidate_metadata,
    create_store,
    is_level_array,
    level_array,
    put_array,
    scale_array,
)

# Seconds between checks whether shards of other writers are free.
_POLL_SECONDS = 0.2
# Values of a task that computes statistics.
_BLOCK_VALUES = 2**20
_CPU_THREADS = 4
_DISK_THREADS = 4


class Writer:
    """Fill one store, alone or with other writers; after a kill it resumes with the missing shards.

    Args:
        scratch: a folder on the file system of `final`, the same for all writers of the store.
        schema: the same for all writers.
        final: path of the finished store. If it exists, complete and with the same schema and provenance,
            nothing is written.
        provenance: attributes of the store, JSON values, the same for all writers.

    Raises StoreError if the scratch folder contains a store with another schema or provenance.
    """

    def __init__(self, scratch: Path, schema: StoreSchema, final: Path, provenance: Mapping):
        self._claimed, self._is_released = {}, False
        self.scratch, self.schema, self.final = Path(scratch), schema, Path(final)
        self._store, self._records = self.scratch / "store.zarr", self.scratch / "shards"
        self._provenance = {**provenance, "fingerprint": checksums.fingerprint(schema, provenance)}
        lock = None
        while lock is None:  # a writer that finishes may delete the folder at this moment
            self._records.mkdir(parents=True, exist_ok=True)
            lock = lock_file(self.scratch / "lock")
        try:
            if self.published() is None:
                self._create()
            else:
                self._remove_scratch()
        finally:
            lock.release()

    def published(self) -> str | None:
        """Return the content digest of the finished store, or None if it or one of its files is missing."""
        with suppress(FileNotFoundError):
            attributes = json.loads((self.final / "zarr.json").read_text())["attributes"]
            is_same = attributes.get("fingerprint") == self._provenance["fingerprint"]
            if attributes.get("complete") and is_same and not checksums.missing_files(self.final):
                return attributes["content_sha256"]
        return None

    def pending_shards(self) -> list[int]:
        """Return the shards that are not written yet, in order."""
        if not self._store.exists():
            return []
        return [shard for shard in range(self.schema.n_shards) if not self._record(shard).exists()]

    def claim_shards(self) -> Iterator[int]:
        """Yield shards to write, each of which this writer has locked against other writers.

        A shard stays locked until it is written. When only shards of other writers are left, the iterator waits for
        them, and yields those whose writer died. It ends early if another writer finishes the store.
        """
        self._is_released = False
        try:
            while pending := [shard for shard in self.pending_shards() if shard not in self._claimed]:
                n_claimed = len(self._claimed)
                for shard in pending:
                    if self._is_released:
                        self.release()  # a shard locked while another thread called `release`
                        return
                    lock = lock_file(self._records / f"{shard}.lock", wait=False)
                    if lock is None:
                        continue
                    if self._record(shard).exists() or not self._store.exists():
                        lock.release()
                        continue
                    self._claimed[shard] = lock
                    yield shard
                # Poll instead of waiting for a lock: two writers could wait for each other.
                if len(self._claimed) == n_claimed:
                    time.sleep(_POLL_SECONDS)
        except GeneratorExit:
            self.release()
            raise

    def release(self) -> None:
        """Unlock the shards that are not being written, and end `claim_shards`."""
        self._is_released = True
        while self._claimed:
            self._claimed.popitem()[1].release()

    __del__ = release

    def write(
        self, shard: int, values: Mapping[str, np.ndarray], cast_stats: Mapping[str, CastStats] | None = None
    ) -> None:
        """Write one whole shard of every array, flush it to the disk, and record it.

        Args:
            shard: number of the shard.
            values: float arrays (sample of the shard, …) by array path; `StoreSchema.shapes` is of a sample.
            cast_stats: of arrays that the caller already cast to the store's dtype, by array path.

        Raises StoreError if there is no such shard, arrays or shapes differ, or the dtype cannot hold the values.
        """
        lock = self._claimed.pop(shard, None)
        try:
            self._write(shard, values, cast_stats or {})
        finally:
            if lock is not None:
                lock.release()

    def _write(self, shard: int, values: Mapping[str, np.ndarray], cast_stats: Mapping) -> None:
        if not 0 <= shard < self.schema.n_shards:
            raise StoreError(
                f"There is no shard {shard}; there are 0 to {self.schema.n_shards - 1}.",
                key="shard", value=shard, path=self.scratch,
            )  # fmt: skip
        rows = self.schema.rows(shard)
        expected = {name: (rows.stop - rows.start, *shape) for name, shape in self.schema.shapes().items()}
        actual = {name: np.shape(array) for name, array in values.items()}
        if actual != expected:
            raise StoreError(
                f"Shard {shard} has the arrays {actual}; the schema requires {expected}.",
                key="values", value=actual, allowed=expected.items(), path=self.scratch,
            )  # fmt: skip
        with ThreadPoolExecutor(_CPU_THREADS) as pool, ThreadPoolExecutor(_DISK_THREADS) as disk:
            files, errors, stats = {}, {}, {}
            for name, array in values.items():
                codec = self.schema.codec if is_level_array(name) else NONE
                cast = cast_array(np.asarray(array), name, self.schema.dtype, codec, pool)
                if array_stats := cast.stats or cast_stats.get(name):
                    errors[name] = check_cast(array_stats, name, self.schema.dtype)
                # The disk writes this array while the CPU casts the next.
                files[name] = disk.submit(self._persist, shard, name, cast.stored, pool)
                if cast.scale is not None:
                    scale = scale_array(name)
                    files[scale] = disk.submit(self._persist, shard, scale, cast.scale, pool)
                if is_level_array(name):
                    stats[name] = self._training_stats(rows, cast, pool)
            digests = dict(file.result() for file in files.values())
        for name in files:
            sync_folder(self._store / name)
        record = {"sha256": digests, "cast_errors": errors, "training_stats": stats}
        write_file(self._record(shard), [json.dumps(record, sort_keys=True).encode()])
        with suppress(FileNotFoundError):  # another writer saw the record, finished the store and deleted the folder
            sync_folder(self._records)

    def finish(self, measurements: Mapping | None = None) -> str:
        """Add training statistics, provenance and checksums, mark the store complete, and publish it.

        Every writer of the store may call it; the first one does the work. Raises StoreError if shards are missing.

        Args:
            measurements: JSON values for the attribute `measurements`, which is no part of the content digest.

        Returns:
            SHA-256 of the content: of every shard and of the attributes.
        """
        if lock := lock_file(self.scratch / "lock"):
            try:
                if self._store.exists():
                    return self._finish(measurements or {})
            finally:
                lock.release()
        if (digest := self.published()) is None:
            raise StoreError(
                f"{self.scratch} was deleted before its store was published at {self.final}. Run again.",
                path=self.scratch,
            )
        return digest

    def _create(self) -> None:
        """Create the store if no writer has, and check that all writers agree on schema and provenance."""
        fingerprint = self._provenance["fingerprint"]
        if not self._store.exists():
            # Records without a store belong to one that was published and then deleted.
            for record in self._records.glob("*.json"):
                record.unlink()
            new_store = self.scratch / "new.zarr"
            create_store(new_store, self.schema)
            write_file(self.scratch / "fingerprint", [fingerprint.encode()])
            publish(new_store, self._store)
        file = self.scratch / "fingerprint"
        if not file.exists() or file.read_text() != fingerprint:
            raise StoreError(
                f"{self.scratch} contains an unfinished store with another schema or provenance. Delete that folder, "
                "or write to a folder named after everything that the content depends on.",
                key="fingerprint", value=fingerprint, path=self.scratch,
            )  # fmt: skip

    def _finish(self, measurements: Mapping) -> str:
        if pending := self.pending_shards():
            raise StoreError(
                f"Shards {pending[:5]} of {self.scratch} are not written yet.",
                key="shards", value=pending, path=self.scratch,
            )  # fmt: skip
        digests, stats, errors = self._merge_records()
        for leftover in [*self._store.rglob("*.partial"), self._store / checksums.NAME]:
            leftover.unlink(missing_ok=True)
        root = zarr.open_group(self._store, mode="r+", use_consolidated=False)
        for index in range(len(self.schema.levels)):
            name = level_array(index)
            self._describe_level(root[f"level{index}"], stats[name], errors[name])
        attributes = self._provenance | self.schema.attributes
        content = checksums.fingerprint(attributes, digests)
        extra = {"measurements": dict(measurements)} if measurements else {}
        attributes |= {**extra, "content_sha256": content, "coordinates": "split", "complete": True}
        root.attrs.update(attributes)
        consolidate_metadata(root)
        checksums.write(self._store, digests)
        publish(self._store, self.final, digests)
        self._remove_scratch()
        return content

    def _remove_scratch(self) -> None:
        """Rename the folder before deleting it, so that another writer finds all of it or nothing."""
        old = self.scratch.with_name(f".{self.scratch.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(self.scratch, old)
        shutil.rmtree(old, ignore_errors=True)

    def _persist(self, shard: int, name: str, array: np.ndarray, pool: Executor) -> tuple[str, str]:
        """Write one shard of one array durably; returns the path of its file in the store and its SHA-256."""
        parts, file = self._encode(name, array), f"{name}/c.{shard}{'.0' * (array.ndim - 1)}"
        digest = pool.submit(_sha256, parts)
        write_file(self._store / file, parts)
        return file, digest.result()

    def _encode(self, name: str, array: np.ndarray) -> list[bytes | memoryview]:
        """The bytes of one shard file: sharded for features, else one chunk padded to full size."""
        full = min(self.schema.shard_size, len(self.schema.sample))
        if not is_level_array(name):
            padding = np.full((full - len(array), *array.shape[1:]), np.nan, dtype=array.dtype)
            return [array.data.cast("B"), padding.tobytes()]
        maps = array.reshape(-1, *array.shape[-3:])
        chunks = [self.schema.codec.compress(level_map) for level_map in maps]
        return codecs.encode(chunks, full * (len(maps) // len(array)))

    def _training_stats(self, rows: slice, cast: CastArray, pool: Executor) -> list | None:
        """Statistics, as they will be read, of a shard's training samples in all views; None if it has none."""
        training = np.flatnonzero(np.array(self.schema.split[rows]) == "train")

        def stats(index: np.ndarray) -> RunningStats | None:
            maps = cast.stored[index]
            if cast.scale is not None:
                quantized, maps = maps, np.empty(maps.shape, self.schema.dtype)
                dequantize(quantized, cast.scale[index], maps)
            return RunningStats.from_array(maps.reshape(-1, *maps.shape[-3:]))

        blocks = [training[part] for part in block_slices(len(training), cast.stored[0].size, _BLOCK_VALUES)]
        total = RunningStats.merge(filter(None, pool.map(stats, blocks)))
        return total.to_json() if total else None

    def _merge_records(self) -> tuple[dict[str, str], dict[str, RunningStats | None], dict[str, list]]:
        """Merge the records: SHA-256 by file; training statistics and cast errors by array of a level."""
        digests, stats, errors = {}, {}, {}
        for shard in range(self.schema.n_shards):
            record = json.loads(self._record(shard).read_text())
            digests |= record["sha256"]
            for name, values in record["training_stats"].items():
                parts = [stats.get(name), RunningStats.from_json(values) if values else None]
                stats[name] = RunningStats.merge(part for part in parts if part)
                errors.setdefault(name, []).append(record["cast_errors"].get(name, {}))
        return digests, stats, errors

    def _describe_level(self, group: zarr.Group, training: RunningStats | None, errors: list) -> None:
        """Store a level's training statistics (NaN without training samples) and its relative error."""
        missing = np.full(group.attrs["channels"], np.nan)
        mean, std = (training.mean, training.std()) if training else (missing, missing)
        for key, values in (("mean", mean), ("std", std)):
            if key in group:
                del group[key]
            put_array(group, key, values, ("channel",))
        squares = sum(shard.get("sum_of_squares", 0.0) for shard in errors)
        squared_error = sum(shard.get("squared_error", 0.0) for shard in errors)
        group.attrs["relative_error"] = math.sqrt(squared_error / squares) if squares else 0.0

    def _record(self, shard: int) -> Path:
        return self._records / f"{shard}.json"


def write_skipped(final: Path, scratch: Path, reason: str) -> None:
    """Write an empty store that states why it is empty, such as a band that the backbone requires."""
    with atomic_dir(scratch, final):
        root = zarr.open_group(scratch, mode="w", zarr_format=3)
        root.attrs.update({"contract": CONTRACT, "skipped": reason, "complete": True})
        consolidate_metadata(root)
        checksums.write(scratch, {})


def _sha256(parts: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
