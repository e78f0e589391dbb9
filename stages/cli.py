"""What every stage shares: its names from the command line, its places on disk, and errors a user can read."""

import argparse
import errno
import fcntl
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

from cache.errors import StoreError
from pipeline.errors import UserError

RAW = Path("data/raw")
ARCHIVES = Path("data/archives")
WEIGHTS = Path("data/weights")
IMAGES = Path("data/images")
FEATURES = Path("data/features")
MANIFESTS = Path("data/manifests")
MODELS = Path("data/models")
SCRATCH = Path("data/scratch")
TUNED = Path("results/tune")
RUNS = Path("results/runs")
COMPOSED = Path("results/compose")
DISTILLED = Path("results/distill")
EXPORTED = Path("results/export")
MAPS = Path("results/map")
COST = Path("results/cost.csv")
RATES = Path("results/rates.csv")
FINETUNED = Path("results/finetune")
REPORT = Path("results/report")
METRICS = Path("results/metrics.json")


def run(
    stage: Callable,
    *names: str,
    either: bool = False,
    flags: Mapping[str, str] = MappingProxyType({}),
    options: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Run a stage with its `--names`; a known failure ends in one paragraph and exit status 1.

    Args:
        either: exactly one of the names is given, instead of all.
        flags: switches that may be given, with their help.
        options: names that may be given, with their help; None if not.
    """
    parser = argparse.ArgumentParser(prog=f"python -m stages.{Path(sys.argv[0]).stem}", description=stage.__doc__)
    required = parser.add_mutually_exclusive_group(required=True) if either else parser
    for name in names:
        required.add_argument(f"--{name}", **({} if either else {"required": True}))
    for flag, text in flags.items():
        parser.add_argument(f"--{flag.replace('_', '-')}", action="store_true", help=text)
    for name, text in options.items():
        parser.add_argument(f"--{name}", help=text)
    arguments = vars(parser.parse_args())
    said = [arguments[name] for name in (*names, *options) if arguments[name]]
    try:
        with exclusive("-".join([stage.__name__, *said]).replace(os.sep, "_")[-200:]):
            stage(**arguments)
    except (UserError, StoreError) as error:
        # Names in files that are not ours may hold what a terminal takes for commands.
        sys.exit("".join(one if one.isprintable() or one == "\n" else f"{one!r}"[1:-1] for one in f"error: {error}"))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        # zarr writes chunks side by side; those that fail after the first would each print a traceback.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        warnings.simplefilter("ignore")
        place = next(path for path in (SCRATCH, SCRATCH.parent, Path()) if path.exists())
        sys.exit(
            f"error: The disk is full: {error.filename or 'a chunk of a store'} could not be written, and "
            f"{shutil.disk_usage(place).free / 1e6:.1f} MB are free where {place.resolve()} lies. Nothing unfinished "
            "was left under its final name. Free some space and run the same command again; it goes on from the "
            "last finished piece."
        )


@contextmanager
def exclusive(name: str):
    """Run with no other living process in the same cell, waiting for one to end.

    A killed `dvc repro` leaves its stage running; the next one must not write beside it. Processes that are given
    this one's open files (`subprocess.run(..., close_fds=False)`) are waited for too.
    """
    SCRATCH.mkdir(parents=True, exist_ok=True)
    with open(SCRATCH / f"{name}.lock", "w") as lock:
        os.set_inheritable(lock.fileno(), True)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that runs {name}", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def read_json(path: Path) -> dict:
    """A JSON file that an earlier stage wrote.

    Raises:
        UserError: it is not there.
    """
    return json.loads(require(path).read_text())


def require(path: Path) -> Path:
    """The path itself.

    Raises:
        UserError: an earlier stage has not written it.
    """
    if not path.exists():
        raise UserError(f"There is no {path}; an earlier stage writes it. Run: dvc repro")
    return path


def write_json(path: Path, content) -> None:
    """Write JSON so that the file appears whole."""
    write_text(path, json.dumps(content, indent=1, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file that appears whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.partial")
    try:
        scratch.write_text(text)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
