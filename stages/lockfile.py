"""Remove the stages without outputs on this machine from dvc.lock, before a long run.

DVC reads and writes all of dvc.lock after every stage, which takes 2 s of CPU time with the default grid's 100 stages
(LAB.md). In a fresh clone, dvc.lock records results of another machine, and it keeps stages that were removed from
the grid. Stages removed from dvc.lock run either way and are recorded when they end.
"""

from collections.abc import Callable
from pathlib import Path

from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.utils.serialize import dumps_yaml, load_yaml

from stages.cli import write_text

LOCK = Path("dvc.lock")


def drop_absent() -> None:
    """Keep only the stages in dvc.lock that have an output in this folder or in DVC's cache.

    With a DVC remote nothing is removed, because `dvc pull` reads from dvc.lock what to download. Errors of reading
    or writing are ignored, because DVC reports them.
    """
    try:
        with Repo(_wait_for_lock=True) as repo, repo.lock:
            if LOCK.exists() and not repo.config["remote"]:
                _drop_entries(load_yaml(LOCK), repo.cache.local.exists)
    except (DvcException, OSError):
        return


def _drop_entries(content: dict, cached: Callable[[str], bool]) -> None:
    stages = content.get("stages") if isinstance(content, dict) else None
    if not isinstance(stages, dict):
        return
    present = {name: entry for name, entry in stages.items() if _has_output(entry, cached)}
    if len(present) < len(stages):
        write_text(LOCK, dumps_yaml({**content, "stages": present}))


def _has_output(entry: dict | None, cached: Callable[[str], bool]) -> bool:
    """Return whether an output exists here; True for stages without outputs or with uncached ones."""
    outs = (entry or {}).get("outs") or ()
    return not outs or any("md5" not in out or Path(out["path"]).exists() or cached(out["md5"]) for out in outs)
