"""Code shared by all stages: arguments, paths of inputs and outputs, and messages for known failures."""

import argparse
import errno
import json
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

from filelock import FileLock, Timeout

from cache.errors import StoreError
from pipeline.errors import UserError

RAW = Path("data/raw")
ARCHIVES = Path("data/archives")
WEIGHTS = Path("data/weights")
IMAGES = Path("data/images")
FEATURES = Path("data/features")
MANIFESTS = Path("data/manifests")
MODELS = Path("data/models")
SELECTED = Path("data/selected")
SCRATCH = Path("data/scratch")
TUNING = Path("results/tune")
RUNS = Path("results/runs")
HEADS = Path("results/heads")
COMPOSITION = Path("results/compose")
SELECTED_TUNING = Path("results/tune_selected")
SELECTED_RUNS = Path("results/train_selected")
DISTILLATION = Path("results/distill")
EXPORTS = Path("results/export")
MAPS = Path("results/map")
COSTS = Path("results/cost")
FINETUNING = Path("results/finetune")
REPORT = Path("results/report")
METRICS = Path("results/metrics.json")

# Longest name of a lock file, in characters.
MAX_LOCK_NAME = 200


def run(
    stage: Callable,
    *names: str,
    exactly_one: bool = False,
    flags: Mapping[str, str] = MappingProxyType({}),
    options: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Run a stage with its command-line arguments.

    A known failure prints one paragraph and exits with status 1.

    Args:
        stage: the function to call with the arguments by name.
        names: required arguments.
        exactly_one: whether exactly one of `names` is required, instead of all.
        flags: optional switches, with their help.
        options: optional arguments, with their help; None if absent.
    """
    parser = argparse.ArgumentParser(prog=f"python -m stages.{Path(sys.argv[0]).stem}", description=stage.__doc__)
    required = parser.add_mutually_exclusive_group(required=True) if exactly_one else parser
    for name in names:
        required.add_argument(f"--{name}", **({} if exactly_one else {"required": True}))
    for flag, text in flags.items():
        parser.add_argument(f"--{flag.replace('_', '-')}", action="store_true", help=text)
    for name, text in options.items():
        parser.add_argument(f"--{name}", help=text)
    arguments = vars(parser.parse_args())
    values = [arguments[name] for name in (*names, *options) if arguments[name]]
    try:
        with exclusive("-".join([stage.__name__, *values]).replace(os.sep, "_")[-MAX_LOCK_NAME:]):
            stage(**arguments)
    except (UserError, StoreError) as error:
        sys.exit(_printable(f"error: {error}"))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        # zarr writes chunks in parallel; those that fail after the first would each print a traceback.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        warnings.simplefilter("ignore")
        sys.exit(_disk_full_message(error))


def _printable(text: str) -> str:
    """Escape control characters: file names may contain sequences that a terminal runs as commands."""
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)


def _disk_full_message(error: OSError) -> str:
    folder = next(path for path in (SCRATCH, SCRATCH.parent, Path()) if path.exists())
    return (
        f"error: The disk is full: {error.filename or 'a chunk of a store'} could not be written, and "
        f"{shutil.disk_usage(folder).free / 1e6:.1f} MB are free on the disk of {folder.resolve()}. No unfinished "
        "file has its final name. Free some space and run the same command again; it resumes after the last finished "
        "piece."
    )


@contextmanager
def exclusive(name: str):
    """Lock a stage's arguments against other processes; wait while another process holds the lock.

    A killed `dvc repro` may leave its stage running, and the next one must not write the same files.
    """
    SCRATCH.mkdir(parents=True, exist_ok=True)
    lock = FileLock(SCRATCH / f"{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another process that runs {name}", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def read_json(path: Path) -> dict:
    """Read a JSON file of an earlier stage; UserError if it does not exist."""
    return json.loads(require(path).read_text())


def require(path: Path) -> Path:
    """Return the path if it exists.

    Raises:
        UserError: no earlier stage has written it.
    """
    if not path.exists():
        raise UserError(f"There is no {path}; an earlier stage writes it. Run: dvc repro", path=path)
    return path


def feature_stores(resolved: Mapping) -> dict[Path, str]:
    """Return the feature stores of a resolved model, with the content digests that they must have."""
    folder = FEATURES / resolved["dataset"]
    return {folder / f"{member['backbone']}.zarr": member["content_sha256"] for member in resolved["members"]}


def write_json(path: Path, content) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(content, indent=1, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.partial")
    try:
        scratch.write_text(text)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
