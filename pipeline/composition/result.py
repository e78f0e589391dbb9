"""The record of a composition search, which the search writes and the report reads."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

FILE = "composition.json"
TABLES = ("subsets", "cka", "greedy")


@dataclass(frozen=True, eq=False)
class CompositionResult:
    """Result of the composition search on one dataset; without backbones the tables are empty.

    Attributes:
        backbones: the backbones that were probed.
        skipped: reasons why other backbones were skipped.
        probe: the probe: `logistic` or `knn`; None without backbones.
        subsets: one row per ensemble; see `search.rank_table`.
        cka: similarity of every two backbones; see `search.cka_table`.
        greedy: layers in the order in which they were added; see `search.greedy_layers`. Empty if not requested.
        selected: the best ensembles, best first.
        trained: those of `selected` that the composition stage trains, because the grid lacks them.
    """

    backbones: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    probe: str | None = None
    subsets: pd.DataFrame = field(default_factory=pd.DataFrame)
    cka: pd.DataFrame = field(default_factory=pd.DataFrame)
    greedy: pd.DataFrame = field(default_factory=pd.DataFrame)
    selected: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()

    def write(self, folder: Path) -> None:
        """Write composition.json and, if backbones were probed, subsets.csv, cka.csv and greedy.csv."""
        if self.backbones:
            for name in TABLES:
                getattr(self, name).to_csv(folder / f"{name}.csv", index=False)
        keys = ("backbones", "skipped", "probe", "selected", "trained")
        text = json.dumps({key: getattr(self, key) for key in keys}, indent=1, sort_keys=True)
        (folder / FILE).write_text(text + "\n")

    @classmethod
    def read(cls, folder: Path) -> "CompositionResult":
        """Read the files that `write` wrote."""
        metadata = json.loads((folder / FILE).read_text())
        fields = {key: tuple(value) if isinstance(value, list) else value for key, value in metadata.items()}
        if fields["backbones"]:
            fields |= {name: pd.read_csv(folder / f"{name}.csv") for name in TABLES}
        return cls(**fields)
