"""params.yaml as frozen, typed records. An unknown key, a wrong type or an unknown name fails here."""

from dataclasses import dataclass, field
from pathlib import Path

import yaml

from pipeline.data.hub import HubFile
from pipeline.errors import UserError
from pipeline.finetune_config import FineTuneConfig
from pipeline.param_checks import check
from pipeline.records import build
from pipeline.student_params import DistillConfig, SearchConfig, StudentConfig


@dataclass(frozen=True)
class GridConfig:
    """What is run: names of datasets, backbones and students, and models as backbone names joined by `+`.

    `finetune` are those of the models whose backbones are trained too.
    """

    datasets: tuple[str, ...]
    backbones: tuple[str, ...]
    models: tuple[str, ...]
    students: tuple[str, ...] = ()
    finetune: tuple[str, ...] = ()


@dataclass(frozen=True)
class SplitFractions:
    """Fractions of spatial blocks."""

    train: float
    val: float
    test: float


@dataclass(frozen=True)
class DatasetConfig:
    """One images store, made by a source under pipeline/data/sources.

    Sources that cut chips take the `task`, `chip` (side in pixels), `block` (side, in pixels, of the spatial blocks
    that are dealt to the splits whole), `splits` and `seed`; sources of finished sets have their own. `options` are
    the source's, declared in its file.
    """

    source: str
    task: str = ""
    chip: int = 0
    block: int = 0
    splits: SplitFractions | None = None
    seed: int = 0
    options: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class BackboneConfig:
    """One feature store per dataset: a variant of a family under pipeline/backbones.

    `weights` is `pretrained`, `random` (a control, drawn from `seed`) or `none` (nothing to learn). `normalisation`
    is `native` (what it was trained with) or `dataset` (the training split's own). `bands` takes others than
    the backbone's own, by name or wavelength in micrometres, in the order of its inputs. `hub` is another file of
    weights. The rest is for the families timm and terratorch, whose members are described here alone: `eats` (as in
    pipeline/backbones/base.py), `layers` (which outputs) and `options` (of the constructor).
    """

    family: str
    variant: str
    weights: str
    input_size: int
    seed: int = 0
    normalisation: str = "native"
    bands: tuple[object, ...] = ()
    hub: HubFile | None = None
    eats: str = ""
    layers: tuple[int, ...] = ()
    options: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class ExtractConfig:
    """How features are computed and stored.

    `precision` is the forward's: float32, bfloat16 or float16; `compiled` is by torch.compile; `batch` is images per
    forward, 0 to find one. `dense` keeps the levels of classification sets too; `shard` is the unit of work and of
    files; `codec` is a name of cache/codecs.py; `views` are names of pipeline/data/augmentation.py, the first of
    which must be `identity`, the copy that heads are trained on.
    """

    dtype: str
    codec: str
    precision: str
    compiled: bool
    batch: int
    shard: int
    dense: bool
    views: tuple[str, ...]


@dataclass(frozen=True)
class LinearHeadConfig:
    """`pooled` is `last` (the deepest vectors of each backbone) or `all` of them side by side.

    `tokens` is what they are of transformers: the `mean` of the patches, the `cls` token, or `both`.
    `steps` of `batch` samples each, whatever the size of the dataset. `patience` is how many checks on validation
    may pass without a better score before a head stops, and then it ends as it was at its best; 0 for all steps.
    """

    pooled: str
    tokens: str
    steps: int
    batch: int
    patience: int = 0


@dataclass(frozen=True)
class UPerNetHeadConfig:
    """`channels` is the decoder's width.

    `neck`: the levels of a transformer, all of one grid, are made a pyramid first, as terratorch does.
    """

    channels: int
    steps: int
    batch: int
    patience: int = 0
    neck: bool = True


@dataclass(frozen=True)
class FcnHeadConfig:
    """A linear score of each level's cells; the cheap probe of segmentation."""

    steps: int = 400
    batch: int = 8
    patience: int = 0


@dataclass(frozen=True)
class HeadsConfig:
    """`segmentation` is `upernet` or `fcn`.

    `fusion` is how members are joined: `concat`, or `average`, `film`, `dot`. `levels` are the numbers of those used,
    0 the finest, -1 the deepest; empty for all. `class_weights` is `none` or `balanced`; `checks` on validation in a
    training, where a head has patience; `precision` of dense heads: `auto` is bfloat16 on a GPU, else float32.
    Features of more than `memory` GB are streamed from the disk.
    """

    linear: LinearHeadConfig
    upernet: UPerNetHeadConfig
    fcn: FcnHeadConfig = FcnHeadConfig()
    segmentation: str = "upernet"
    fusion: str = "concat"
    levels: tuple[int, ...] = ()
    class_weights: str = "none"
    checks: int = 10
    precision: str = "auto"
    memory: float = 4.0


@dataclass(frozen=True)
class TrainConfig:
    seeds: int


@dataclass(frozen=True)
class CompositionConfig:
    """The composition search.

    Every ensemble of `backbones` (none named: all of the grid's but those with random weights, which are controls)
    is probed on validation, and the `best` few are run by the full protocol. `probe` is `logistic` or `knn`;
    segmentation sets are always probed by logistic regression on pixels. `greedy` also adds layers one by one.
    """

    backbones: tuple[str, ...]
    probe: str
    best: int
    greedy: bool


@dataclass(frozen=True)
class ComputeConfig:
    """Where the backbones run.

    `device` is `auto` (a GPU if there is one), `cpu` or `cuda`. Extraction runs in `workers` processes of this
    machine, one a GPU, or, if it is 0, in the stage's own; or on the workers of the Dask `scheduler` at an address.
    """

    device: str
    workers: int
    scheduler: str


@dataclass(frozen=True)
class Params:
    grid: GridConfig
    datasets: dict[str, DatasetConfig]
    backbones: dict[str, BackboneConfig]
    weights_dir: str
    extract: ExtractConfig
    heads: HeadsConfig
    search: SearchConfig
    train: TrainConfig
    compose: CompositionConfig
    compute: ComputeConfig
    students: dict[str, StudentConfig]
    distill: DistillConfig
    geobench_dir: str = "data/geobench"
    finetune: FineTuneConfig = field(default_factory=FineTuneConfig)

    def dataset(self, name: str) -> DatasetConfig:
        return _named(self.datasets, name, "dataset", "datasets")

    def backbone(self, name: str) -> BackboneConfig:
        return _named(self.backbones, name, "backbone", "backbones")

    def student(self, name: str) -> StudentConfig:
        return _named(self.students, name, "student", "students")

    def composed(self) -> list[str]:
        """Names of the backbones whose ensembles are searched."""
        chosen = [name for name in self.grid.backbones if self.backbone(name).weights != "random"]
        return list(self.compose.backbones) or chosen

    def members(self, model: str) -> list[str]:
        """Backbone names of a model such as `csmask_b4+lite0`."""
        names = model.split("+")
        for name in names:
            self.backbone(name)
        if len(set(names)) != len(names):
            raise UserError(f"Model '{model}' names a backbone twice. Name each once.")
        return names


def load(path: Path | str = "params.yaml") -> Params:
    """Read and check params.yaml.

    Raises:
        UserError: unreadable file, unknown or missing key, wrong type, or a name that is not described.
    """
    try:
        raw = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"There is no {path} here. Run from the root of the repository.") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    params = build(Params, raw, "params.yaml")
    check(params)
    return params


def _named(table: dict, name: str, what: str, section: str):
    if name not in table:
        raise UserError(
            f"There is no {what} '{name}'. params.yaml describes: {', '.join(table)}. "
            f"Use one of these, or describe '{name}' under '{section}:' first."
        )
    return table[name]
