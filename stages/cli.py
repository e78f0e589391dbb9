"""Code shared by all stages: arguments, paths of inputs and outputs, and messages for known failures."""

import argparse
import errno
import inspect
import json
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from cache.atomic import atomic_dir
from cache.errors import StoreError
from pipeline import config
from pipeline.errors import UserError

if TYPE_CHECKING:  # torch takes 3 s to import; a skipped dataset needs none of it
    from pipeline.finetuning.train import FineTuneResult
    from pipeline.training.protocol import ProtocolResult
    from pipeline.training.task_data import TaskData

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

# A table of runs without a run.
NO_RUNS = "dataset,model\n"
# Longest name of a file in SCRATCH, in characters, without its suffix.
MAX_NAME = 200


def run(stage: Callable, exactly_one: Sequence[str] = ()) -> None:
    """Run a stage with its command-line arguments, one option per parameter of its function.

    A `str` is required, a `str | None` optional, and a `bool` a switch. A known failure prints one paragraph, and the
    exit status is 1.

    Args:
        exactly_one: optional parameters of which the user must give one and no other.
    """
    parser = argparse.ArgumentParser(prog=f"python -m stages.{Path(sys.argv[0]).stem}", description=stage.__doc__)
    group = parser.add_mutually_exclusive_group(required=True) if exactly_one else parser
    for name, parameter in inspect.signature(stage).parameters.items():
        is_switch, is_required = parameter.annotation is bool, parameter.annotation is str
        settings = {"action": "store_true"} if is_switch else {"required": is_required}
        (group if name in exactly_one else parser).add_argument(f"--{name.replace('_', '-')}", **settings)
    arguments = vars(parser.parse_args())
    values = [value for value in arguments.values() if isinstance(value, str)]
    try:
        with exclusive("-".join([stage.__name__, *values]).replace(os.sep, "_")[-MAX_NAME:]):
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


def load_params(dataset: str) -> config.Params:
    """Read params.yaml; UserError if it does not describe the dataset."""
    params = config.load()
    params.dataset(dataset)
    return params


def load_task_data(params: config.Params, resolved: Mapping, splits: Sequence[str]) -> tuple["TaskData", str]:
    """Load features and labels of a resolved model; return them and the device that they are on."""
    # torch takes 3 s to import; a skipped model needs none of it
    from pipeline.device import resolve_device
    from pipeline.training import task_data

    device = resolve_device(params.compute.device)
    stores, images = feature_stores(resolved), images_path(resolved["dataset"])
    return task_data.load(stores, images, params.heads, splits, device), device


def images_path(dataset: str) -> Path:
    return IMAGES / f"{dataset}.zarr"


def feature_stores(resolved: Mapping) -> dict[Path, str]:
    """Return the feature stores of a resolved model, with the content digests that they must have."""
    folder = FEATURES / resolved["dataset"]
    return {folder / f"{member['backbone']}.zarr": member["content_sha256"] for member in resolved["members"]}


def weights_of(resolved: Mapping) -> str:
    """Describe the weights of a resolved model, as in runs.csv."""
    return "+".join(str(member["weights"]) for member in resolved["members"])


def require(path: Path) -> Path:
    """Return the path if it exists; UserError if no earlier stage has written it."""
    if not path.exists():
        raise UserError(f"There is no {path}; an earlier stage writes it. Run: dvc repro", path=path)
    return path


def read_json(path: Path) -> Any:
    """Read a JSON file of an earlier stage; UserError if it does not exist."""
    return json.loads(require(path).read_text())


def publish_folder(final: Path) -> AbstractContextManager[Path]:
    """Write a folder of results: it gets its name when it is complete."""
    return atomic_dir(SCRATCH / "-".join(final.resolve().parts[1:])[-MAX_NAME:], final)


def publish_skipped(final: Path, file: str, reason: str) -> None:
    """Write a folder with one JSON file, which states why there are no results, and print the reason."""
    with publish_folder(final) as folder:
        write_json(folder / file, {"skipped": reason})
    print(f"skipped: {reason}")


def write_runs(folder: Path, result: "ProtocolResult | FineTuneResult") -> None:
    """Write the scores of every run, and the predictions of the test samples."""
    result.runs.to_csv(folder / "runs.csv", index=False)
    result.predicted.to_parquet(folder / "predictions.parquet")


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
