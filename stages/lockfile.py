"""dvc.lock without the stages of which nothing is here, before a long run.

DVC reads and writes all of dvc.lock after every stage, 2 s of a processor where it has the default grid's 100 stages
(LAB.md), though in a fresh clone it records what was made elsewhere, and stages that the grid no longer has stay in
it for ever. Those stages run whether it names them or not, and are entered as they end.
"""

import os
from pathlib import Path

from dvc.repo import Repo
from dvc.utils.serialize import dump_yaml, load_yaml

LOCK = Path("dvc.lock")


def drop_absent() -> None:
    """Leave in dvc.lock the stages that have an output in this folder or in DVC's cache.

    Nothing is dropped where a DVC remote is set: `dvc pull` reads there what to fetch.
    """
    with Repo(_wait_for_lock=True) as repo, repo.lock:
        if repo.config["remote"] or not LOCK.exists():
            return
        told = load_yaml(LOCK)
        cached = repo.cache.local.exists
        kept = {name: entry for name, entry in told["stages"].items() if _here(entry, cached)}
        if len(kept) < len(told["stages"]):
            scratch = LOCK.with_suffix(".lock.scratch")
            dump_yaml(scratch, {**told, "stages": kept})
            os.replace(scratch, LOCK)


def _here(entry: dict, cached) -> bool:
    return any(Path(out["path"]).exists() or cached(out["md5"]) for out in entry.get("outs", ()))
