"""dvc.lock without the stages of which nothing is here, before a long run.

DVC reads and writes all of dvc.lock after every stage, 2 s of a processor where it has the default grid's 100 stages
(LAB.md), though in a fresh clone it records what was made elsewhere, and stages that the grid no longer has stay in
it for ever. Those stages run whether it names them or not, and are entered as they end.
"""

from collections.abc import Callable
from pathlib import Path

from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.utils.serialize import dumps_yaml, load_yaml

from stages.cli import write_text

LOCK = Path("dvc.lock")


def drop_absent() -> None:
    """Leave in dvc.lock the stages that have an output in this folder or in DVC's cache.

    Nothing is dropped where a DVC remote is set: `dvc pull` reads there what to fetch. A file that cannot be read
    or written is left to DVC, which says what is wrong with it.
    """
    try:
        with Repo(_wait_for_lock=True) as repo, repo.lock:
            if LOCK.exists() and not repo.config["remote"]:
                _drop(load_yaml(LOCK), repo.cache.local.exists)
    except (DvcException, OSError):
        return


def _drop(told: dict, cached: Callable[[str], bool]) -> None:
    stages = told.get("stages") if isinstance(told, dict) else None
    if not isinstance(stages, dict):
        return
    kept = {name: entry for name, entry in stages.items() if _here(entry, cached)}
    if len(kept) < len(stages):
        write_text(LOCK, dumps_yaml({**told, "stages": kept}))


def _here(entry: dict | None, cached: Callable[[str], bool]) -> bool:
    """Whether an output is here; of a stage without outputs, or with others than DVC's own, nobody can tell."""
    outs = (entry or {}).get("outs") or ()
    return not outs or any("md5" not in out or Path(out["path"]).exists() or cached(out["md5"]) for out in outs)
