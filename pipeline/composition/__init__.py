"""Search over ensembles of backbones with quick probes, and measure how similar the backbones are.

The result of a search is here, apart from the search, because the report reads it and torch takes 3 s to import.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

FILE = "composition.json"
KEYS = ("backbones", "skipped", "probe", "selected")
TABLES = ("subsets", "cka", "greedy")


@dataclass(frozen=True, eq=False)
class CompositionResult:
    """Result of the composition search on one dataset; without backbones the tables are empty.

    Attributes:
        skipped: reasons why other backbones were skipped.
        probe: `logistic` or `knn`; None without backbones.
        subsets: one row per ensemble; see `search.rank_table`.
        cka: similarity of every two backbones; see `search.cka_table`.
        greedy: layers in the order in which they were added; see `search.greedy_layers`. Empty if not requested.
        selected: the best ensembles, best first.
    """

    backbones: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    probe: str | None = None
    subsets: pd.DataFrame = field(default_factory=pd.DataFrame)
    cka: pd.DataFrame = field(default_factory=pd.DataFrame)
    greedy: pd.DataFrame = field(default_factory=pd.DataFrame)
    selected: tuple[str, ...] = ()

    def missing_from(self, models: Iterable[str]) -> list[str]:
        """Return the selected ensembles that are not among these models, whose members can have any order."""
        known_members = {frozenset(model.split("+")) for model in models}
        return [model for model in self.selected if frozenset(model.split("+")) not in known_members]

    def write(self, folder: Path) -> None:
        """Write composition.json and, if backbones were probed, subsets.csv, cka.csv and greedy.csv."""
        if self.backbones:
            for name in TABLES:
                getattr(self, name).to_csv(folder / f"{name}.csv", index=False)
        text = json.dumps({key: getattr(self, key) for key in KEYS}, indent=1, sort_keys=True)
        (folder / FILE).write_text(text + "\n")

    @classmethod
    def read(cls, folder: Path) -> "CompositionResult":
        """Read the files that `write` wrote."""
        metadata = json.loads((folder / FILE).read_text())
        fields = {key: tuple(value) if isinstance(value, list) else value for key, value in metadata.items()}
        if fields["backbones"]:
            fields |= {name: pd.read_csv(folder / f"{name}.csv") for name in TABLES}
        return cls(**fields)
