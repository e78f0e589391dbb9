"""Writing a feature store: whole shards, each recorded after its bytes are safe, published in one step.

Writers, of which there may be many on many machines, share a scratch folder that their caller names after
everything that decides the content:

    <scratch>/store.zarr          the store, at full size, filled shard by shard
    <scratch>/shards/<k>.json     exists once shard k is safe: the SHA-256 of its files, what was lost, and the
                                  moments of its training samples
    <scratch>/shards/<k>.lock     held by the writer at work on shard k; a killed writer lets go
    <scratch>/lock                held while the store is laid down and while it is finished
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import zarr

from cache import checksums, running_stats
from cache import zarr_shard as shard_format
from cache.atomic import atomic_dir, publish, sync_folder, write_file
from cache.casting import CastArray, cast_array
from cache.codecs import NONE, dequantize
from cache.errors import StoreError
from cache.locks import file_lock, try_lock
from cache.schema import CONTRACT, StoreSchema, consolidate_metadata, create_store, put_array

# Seconds between looks at shards that others have in hand.
_POLL_SECONDS = 0.2
# Values in a task that sums them.
_BLOCK_VALUES = 2**20


class Writer:
    """Fills one store, alone or beside other writers; after a kill it goes on at the first missing shard.

    Args:
        scratch: on the file system of `final`; shared by all that write this store.
        layout: the same for all of them.
        final: where the finished store appears. If it is there already, whole, with the same layout and provenance,
            there is nothing to do.
        provenance: attributes of the store, JSON values; the same for all of them.

    Raises:
        StoreError: the scratch folder holds the beginning of another store.
    """

    def __init__(self, scratch: Path, schema: StoreSchema, final: Path, provenance: Mapping):
        self._claimed, self._given_up = {}, False
        self.scratch, self.schema, self.final = Path(scratch), schema, Path(final)
        self._store, self._records = self.scratch / "store.zarr", self.scratch / "shards"
        made_from = json.dumps([repr(schema), dict(provenance)], sort_keys=True)
        self._provenance = {**provenance, "made_from_sha256": hashlib.sha256(made_from.encode()).hexdigest()}
        held = False
        while not held:  # a writer that finishes takes the folder away while this one is arriving
            self._records.mkdir(parents=True, exist_ok=True)
            with file_lock(self.scratch / "lock") as held:
                if held and self.published() is None:
                    self._create()
                elif held:
                    self._remove_scratch()

    def published(self) -> str | None:
        """The content digest of the finished store, if it is at its final name with all its files."""
        with suppress(FileNotFoundError):
            said = json.loads((self.final / "zarr.json").read_text())["attributes"]
            ours = said.get("made_from_sha256") == self._provenance["made_from_sha256"]
            if said.get("complete") and ours and not checksums.missing_files(self.final):
                return said["content_sha256"]
        return None

    def pending_shards(self) -> list[int]:
        """Shards still to be written, in order."""
        if not self._store.exists():
            return []
        return [shard for shard in range(self.schema.n_shards) if not self._record(shard).exists()]

    def claim_shards(self) -> Iterator[int]:
        """Shards to write, one after another, none that another living writer has in hand.

        A shard is in this writer's hand from here until it is written. At the end waits for those in other hands, and
        yields them too if their writer dies. Ends early if another writer finished the store, and with it the
        scratch folder.
        """
        self._given_up = False
        try:
            while open_ones := [shard for shard in self.pending_shards() if shard not in self._claimed]:
                before = len(self._claimed)
                for shard in open_ones:
                    if self._given_up:
                        self.release()  # what was taken while another thread let go
                        return
                    lock = try_lock(self._records / f"{shard}.lock")
                    if lock is None:
                        continue
                    if self._record(shard).exists() or not self._store.exists():
                        os.close(lock)
                        continue
                    self._claimed[shard] = lock
                    yield shard
                if len(self._claimed) == before:  # never wait for a lock itself: two that wait may wait for each other
                    time.sleep(_POLL_SECONDS)
        except GeneratorExit:  # its user gave up
            self.release()
            raise

    def release(self) -> None:
        """Let go of the shards in this writer's hand that are not being written, and take no more."""
        self._given_up = True
        while self._claimed:
            os.close(self._claimed.popitem()[1])

    __del__ = release

    def write(self, shard: int, values: Mapping[str, np.ndarray], cast_errors: Mapping | None = None) -> None:
        """Write one whole shard of every array, make it durable, and record it.

        Args:
            values: float arrays (rows of the shard, …) by array path; `Layout.shapes` has one sample's shape.
            lost: of arrays that the caller narrowed to the store's dtype: the sums of squares that this lost, and of
                what there was before.

        Raises:
            StoreError: no such shard; an array is missing or of the wrong shape, or holds values that the dtype
                cannot.
        """
        lock = self._claimed.pop(shard, None)
        try:
            self._write(shard, values, cast_errors or {})
        finally:
            if lock is not None:
                os.close(lock)

    def _write(self, shard: int, values: Mapping[str, np.ndarray], lost: Mapping) -> None:
        if not 0 <= shard < self.schema.n_shards:
            raise StoreError(f"There is no shard {shard}; there are 0 to {self.schema.n_shards - 1}.")
        rows = self.schema.rows(shard)
        shapes = {name: (rows.stop - rows.start, *shape) for name, shape in self.schema.shapes().items()}
        given = {name: np.shape(array) for name, array in values.items()}
        if given != shapes:
            raise StoreError(f"Shard {shard} has the arrays {given}; wanted {shapes}.")
        with ThreadPoolExecutor(4) as pool, ThreadPoolExecutor(4) as disk:
            persisted, loss, measured = {}, {}, {}
            for name, array in values.items():
                codec = self.schema.codec if name.endswith("/features") else NONE
                prepared = cast_array(np.asarray(array), name, self.schema.dtype, codec, pool)
                loss[name] = lost.get(name) or [prepared.squared_error, prepared.sum_of_squares]
                # The disk works on this array while the processor prepares the next.
                persisted[name] = disk.submit(self._persist, shard, name, prepared.stored, pool)
                if prepared.scale is not None:
                    scale = name.replace("features", "scale")
                    persisted[scale] = disk.submit(self._persist, shard, scale, prepared.scale, pool)
                if name.endswith("/features"):
                    measured[name] = self._training_stats(rows, prepared, pool)
            digests = dict(file.result() for file in persisted.values())
        for name in persisted:
            sync_folder(self._store / name)
        record = {"sha256": digests, "loss": loss, "moments": measured}
        write_file(self._record(shard), [json.dumps(record, sort_keys=True).encode()])
        with suppress(FileNotFoundError):  # another writer saw the record, finished the store and tidied up
            sync_folder(self._records)

    def finish(self, measured: Mapping | None = None) -> str:
        """Add training statistics, provenance and checksums, mark the store complete, and publish it.

        Every writer of the store may call it; the first does the work.

        Args:
            measured: what was found on the way and decides no content, JSON values: the attribute `measured`.

        Returns:
            The SHA-256 of the content: of every shard and of the provenance.

        Raises:
            StoreError: shards are missing.
        """
        with file_lock(self.scratch / "lock") as held:
            if held and self._store.exists():
                return self._finish(measured or {})
        if (digest := self.published()) is None:
            raise StoreError(f"{self.scratch} was taken away before its store was at {self.final}. Run again.")
        return digest

    def _create(self) -> None:
        """Create the store if no writer has, and check that those before meant the same one."""
        ours = self._provenance["made_from_sha256"]
        if not self._store.exists():
            # Records without a store are of one that was published and then deleted.
            for record in self._records.glob("*.json"):
                record.unlink()
            laid = self.scratch / "laid.zarr"
            create_store(laid, self.schema)
            write_file(self.scratch / "made_from", [ours.encode()])
            publish(laid, self._store)
        if (self.scratch / "made_from").read_text() != ours:
            raise StoreError(
                f"{self.scratch} holds the beginning of a store with another layout or provenance. Delete that "
                "folder, or write to one named after everything that decides the content."
            )

    def _finish(self, measured: Mapping) -> str:
        if pending := self.pending_shards():
            raise StoreError(f"Shards {pending[:5]} of {self.scratch} are not written yet.")
        shards, found = self._merge_records()
        for torn in [*self._store.rglob("*.partial"), self._store / checksums.NAME]:
            torn.unlink(missing_ok=True)
        root = zarr.open_group(self._store, mode="r+", use_consolidated=False)
        for index in range(len(self.schema.levels)):
            self._describe_level(root[f"level{index}"], *found[f"level{index}/features"])
        described = {
            **self._provenance,
            "contract": CONTRACT,
            "dtype": self.schema.dtype,
            "codec": self.schema.codec.label,
        }
        content = checksums.content_digest(described, shards)
        beside = {"measured": dict(measured)} if measured else {}
        root.attrs.update(
            {**described, **beside, "content_sha256": content, "coordinates": "split", "complete": True}
        )
        consolidate_metadata(root)
        checksums.write(self._store, shards)
        publish(self._store, self.final, shards)
        self._remove_scratch()
        return content

    def _remove_scratch(self) -> None:
        """Take the folder away in one step, so that another writer finds all of it or none."""
        gone = self.scratch.with_name(f".{self.scratch.name}.old")
        shutil.rmtree(gone, ignore_errors=True)
        os.rename(self.scratch, gone)
        shutil.rmtree(gone, ignore_errors=True)

    def _persist(self, shard: int, name: str, array: np.ndarray, pool: Executor) -> tuple[str, str]:
        """Write one shard of one array durably; returns its file's path in the store and SHA-256."""
        parts, file = self._parts(name, array), f"{name}/c.{shard}{'.0' * (array.ndim - 1)}"
        digest = pool.submit(_sha256, parts)
        write_file(self._store / file, parts)
        return file, digest.result()

    def _parts(self, name: str, array: np.ndarray) -> list[bytes | memoryview]:
        """The bytes of one shard file: sharded for features, one chunk padded to full size for the rest."""
        full = min(self.schema.shard_size, len(self.schema.sample))
        if not name.endswith("/features"):
            padding = np.full((full - len(array), *array.shape[1:]), np.nan, dtype=array.dtype)
            return [array.data.cast("B"), padding.tobytes()]
        maps = array.reshape(-1, *array.shape[-3:])
        chunks = [self.schema.codec.compress(one) for one in maps]
        return shard_format.encode(chunks, full * (len(maps) // len(array)))

    def _training_stats(self, rows: slice, prepared: CastArray, pool: Executor) -> list | None:
        """Of a shard's training samples, all views, as a reader gets them; None if it has none."""
        training = np.flatnonzero(np.array(self.schema.split[rows]) == "train")

        def of(some: np.ndarray) -> running_stats.RunningStats:
            maps = prepared.stored[some]
            if prepared.scale is not None:
                steps, maps = maps, np.empty(maps.shape, self.schema.dtype)
                dequantize(steps, prepared.scale[some], maps)
            return running_stats.from_array(maps.reshape(-1, *maps.shape[-3:]))

        blocks = [training[some] for some in running_stats.block_slices(len(training), prepared.stored[0].size, _BLOCK_VALUES)]
        whole = running_stats.merge(pool.map(of, blocks))
        return whole and whole.to_json()

    def _merge_records(self) -> tuple[dict[str, str], dict[str, tuple]]:
        """From the records, one after another: every file's SHA-256, and each level's moments and losses."""
        digests, found = {}, {}
        for shard in range(self.schema.n_shards):
            record = json.loads(self._record(shard).read_text())
            digests |= record["sha256"]
            for name, part in record["moments"].items():
                whole, losses = found.get(name, (None, []))
                parts = [one for one in (whole, part and running_stats.RunningStats.from_json(part)) if one]
                found[name] = running_stats.merge(parts), [*losses, record["loss"][name]]
        return digests, found

    def _describe_level(self, group: zarr.Group, training: running_stats.RunningStats | None, losses: list) -> None:
        """Training statistics of a level (NaN without training samples), and the relative error of storing it."""
        nothing = np.full(group.attrs["channels"], np.nan)
        mean, std = (training.mean, training.std()) if training else (nothing, nothing)
        for key, values in (("mean", mean), ("std", std)):
            if key in group:
                del group[key]
            put_array(group, key, values, ("channel",))
        error, size = np.array(losses).sum(axis=0)
        group.attrs["relative_error"] = float(np.sqrt(error / size)) if size else 0.0

    def _record(self, shard: int) -> Path:
        return self._records / f"{shard}.json"


def write_skipped(final: Path, scratch: Path, reason: str) -> None:
    """An empty store that says why it is empty: the backbone cannot see this dataset."""
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
