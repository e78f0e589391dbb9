"""params.yaml as frozen, typed records. An unknown key, a wrong type or an unknown name fails here."""

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from cache import codecs
from pipeline.encoding.views import VIEWS
from pipeline.errors import UserError
from pipeline.finetune.described import FineTune
from pipeline.finetune.described import check as check_finetune
from pipeline.hub import HubFile
from pipeline.records import build
from pipeline.student_params import Distill, Search, Student, check_search
from pipeline.student_params import check as check_students

TASKS = ("classification", "multilabel", "segmentation")


@dataclass(frozen=True)
class Grid:
    """What is run: names of datasets, backbones and students, and models as backbone names joined by `+`.

    `finetune` are those of the models whose backbones are trained too.
    """

    datasets: tuple[str, ...]
    backbones: tuple[str, ...]
    models: tuple[str, ...]
    students: tuple[str, ...] = ()
    finetune: tuple[str, ...] = ()


@dataclass(frozen=True)
class Splits:
    """Fractions of spatial blocks."""

    train: float
    val: float
    test: float


@dataclass(frozen=True)
class Dataset:
    """One images store, made by a source under pipeline/datasets.

    Sources that cut chips take the `task`, `chip` (side in pixels), `block` (side, in pixels, of the spatial blocks
    that are dealt to the splits whole), `splits` and `seed`; sources of finished sets have their own. `options` are
    the source's, declared in its file.
    """

    source: str
    task: str = ""
    chip: int = 0
    block: int = 0
    splits: Splits | None = None
    seed: int = 0
    options: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Backbone:
    """One feature store per dataset: a variant of a family under pipeline/backbones.

    `weights` is `pretrained`, `random` (a control, drawn from `seed`) or `none` (nothing to learn). `normalisation`
    is `native` (what it was trained with) or `dataset` (the training split's own). `bands` takes others than
    the backbone's own, by name or wavelength in micrometres, in the order of its inputs. `hub` is another file of
    weights. The rest is for the families timm and terratorch, whose members are described here alone: `eats` (as in
    pipeline/encoding/pyramid.py), `layers` (which outputs) and `options` (of the constructor).
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
class Extract:
    """How features are computed and stored.

    `precision` is the forward's: float32, bfloat16 or float16; `compiled` is by torch.compile; `batch` is images per
    forward, 0 to find one. `dense` keeps the levels of classification sets too; `shard` is the unit of work and of
    files; `codec` is a name of cache/codecs.py; `views` are names of pipeline/encoding/views.py, the first of
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
class LinearHead:
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
class UperNetHead:
    """`channels` is the decoder's width.

    `neck`: the levels of a transformer, all of one grid, are made a pyramid first, as terratorch does.
    """

    channels: int
    steps: int
    batch: int
    patience: int = 0
    neck: bool = True


@dataclass(frozen=True)
class FcnHead:
    """A linear score of each level's cells; the cheap probe of segmentation."""

    steps: int = 400
    batch: int = 8
    patience: int = 0


@dataclass(frozen=True)
class Heads:
    """`segmentation` is `upernet` or `fcn`.

    `fusion` is how members are joined: `concat`, or `average`, `film`, `dot`. `levels` are the numbers of those used,
    0 the finest, -1 the deepest; empty for all. `class_weights` is `none` or `balanced`; `checks` on validation in a
    training, where a head has patience; `precision` of dense heads: `auto` is bfloat16 on a GPU, else float32.
    Features of more than `memory` GB are streamed from the disk.
    """

    linear: LinearHead
    upernet: UperNetHead
    fcn: FcnHead = FcnHead()
    segmentation: str = "upernet"
    fusion: str = "concat"
    levels: tuple[int, ...] = ()
    class_weights: str = "none"
    checks: int = 10
    precision: str = "auto"
    memory: float = 4.0


@dataclass(frozen=True)
class Train:
    seeds: int


@dataclass(frozen=True)
class Compose:
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
class Compute:
    """Where the backbones run.

    `device` is `auto` (a GPU if there is one), `cpu` or `cuda`. Extraction runs in `workers` processes of this
    machine, one a GPU, or, if it is 0, in the stage's own; or on the workers of the Dask `scheduler` at an address.
    """

    device: str
    workers: int
    scheduler: str


@dataclass(frozen=True)
class Params:
    grid: Grid
    datasets: dict[str, Dataset]
    backbones: dict[str, Backbone]
    weights_dir: str
    extract: Extract
    heads: Heads
    search: Search
    train: Train
    compose: Compose
    compute: Compute
    students: dict[str, Student]
    distill: Distill
    geobench_dir: str = "data/geobench"
    finetune: FineTune = field(default_factory=FineTune)

    def dataset(self, name: str) -> Dataset:
        return _named(self.datasets, name, "dataset", "datasets")

    def backbone(self, name: str) -> Backbone:
        return _named(self.backbones, name, "backbone", "backbones")

    def student(self, name: str) -> Student:
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
    _check(params)
    return params


def _named(table: dict, name: str, what: str, section: str):
    if name not in table:
        raise UserError(
            f"There is no {what} '{name}'. params.yaml describes: {', '.join(table)}. "
            f"Use one of these, or describe '{name}' under '{section}:' first."
        )
    return table[name]


def _check(params: Params) -> None:
    for axis in ("datasets", "backbones", "models"):
        names = getattr(params.grid, axis)
        if not names or len(set(names)) != len(names):
            raise UserError(f"grid.{axis} is {list(names)}; it must name at least one, and each once.")
    for name in (*params.datasets, *params.backbones):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):  # it becomes a file's name, and one of a model's
            raise UserError(f"'{name}' is no name here; one has letters, digits, '.', '_' and '-', and no others.")
    for name in params.grid.datasets:
        params.dataset(name)
    for name in params.grid.backbones:
        params.backbone(name)
    same = [sorted(params.members(model)) for model in params.grid.models]
    if twice := [model for model, members in zip(params.grid.models, same, strict=True) if same.count(members) > 1]:
        raise UserError(f"grid.models has {' and '.join(twice)}, which are the same ensemble. Name each once.")
    for model in params.grid.models:
        for name in params.members(model):
            if name not in params.grid.backbones:
                raise UserError(
                    f"grid.models has '{model}', but its backbone '{name}' is not in grid.backbones "
                    f"({', '.join(params.grid.backbones)}), so nothing would extract its features. Add it there."
                )
    for model in params.grid.finetune:
        if model not in params.grid.models or params.grid.finetune.count(model) > 1:
            raise UserError(
                f"grid.finetune is {list(params.grid.finetune)}; it must name models of grid.models "
                f"({', '.join(params.grid.models)}), whose frozen heads are the start, and each once."
            )
    check_finetune(params.finetune)
    for name, dataset in params.datasets.items():
        _one_of(dataset.task, ("", *TASKS), f"datasets.{name}.task")
        fractions = dataclasses.astuple(dataset.splits) if dataset.splits else (1,)
        if min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
            raise UserError(
                f"datasets.{name}.splits are {fractions}; train, val and test must be positive and sum to 1."
            )
        for key in ("seed", "chip", "block"):
            _not_negative(f"datasets.{name}.{key}", getattr(dataset, key))
        if dataset.chip and dataset.block % dataset.chip:
            raise UserError(
                f"datasets.{name} has chip {dataset.chip} and block {dataset.block}; the block must be a "
                "multiple of the chip, so that no chip reaches into another split's block."
            )
    for name, backbone in params.backbones.items():
        _one_of(backbone.weights, ("pretrained", "random", "none"), f"backbones.{name}.weights")
        _not_negative(f"backbones.{name}.seed", backbone.seed)
        _one_of(backbone.normalisation, ("native", "dataset"), f"backbones.{name}.normalisation")
        _one_of(backbone.eats, ("", "reflectance", "display", "unit"), f"backbones.{name}.eats")
        _positive(f"backbones.{name}", input_size=backbone.input_size)
    _one_of(params.extract.dtype, ("float16", "float32"), "extract.dtype")
    _one_of(params.extract.precision, ("float32", "bfloat16", "float16"), "extract.precision")
    try:
        codecs.parse(params.extract.codec, params.extract.dtype)
    except ValueError as error:
        raise UserError(f"extract.codec: {error}.") from None
    views = params.extract.views
    for view in views:
        _one_of(view, tuple(VIEWS), "extract.views")
    if views[:1] != ("identity",) or len(set(views)) != len(views):
        raise UserError(f"extract.views is {list(views)}; it must begin with identity and name each view once.")
    _check_heads(params.heads)
    _one_of(params.compute.device, ("auto", "cpu", "cuda"), "compute.device")
    _positive("extract", shard=params.extract.shard)
    for key, value in (("extract.batch", params.extract.batch), ("compute.workers", params.compute.workers)):
        if value < 0:
            raise UserError(f"{key} is {value}; it must not be negative.")
    check_search("search", params.search)
    for name in params.distill.datasets:
        params.dataset(name)
    check_students(params.students, params.distill, params.grid, params.backbones)
    _positive("train", seeds=params.train.seeds)
    _check_compose(params)


def _check_compose(params: Params) -> None:
    names = params.compose.backbones
    for name in names:
        params.backbone(name)
        if name not in params.grid.backbones:
            raise UserError(
                f"compose.backbones has '{name}', which is not in grid.backbones "
                f"({', '.join(params.grid.backbones)}), so nothing would extract its features. Add it there."
            )
    if len(set(names)) != len(names):
        raise UserError(f"compose.backbones is {list(names)}; name each once.")
    _one_of(params.compose.probe, ("logistic", "knn"), "compose.probe")
    if params.compose.best < 0:
        raise UserError(f"compose.best is {params.compose.best}; it must not be negative.")


def _check_heads(heads: Heads) -> None:
    _one_of(heads.linear.pooled, ("last", "all"), "heads.linear.pooled")
    _one_of(heads.linear.tokens, ("mean", "cls", "both"), "heads.linear.tokens")
    _one_of(heads.segmentation, ("upernet", "fcn"), "heads.segmentation")
    _one_of(heads.fusion, ("concat", "average", "film", "dot"), "heads.fusion")
    _one_of(heads.class_weights, ("none", "balanced"), "heads.class_weights")
    _one_of(heads.precision, ("auto", "float32", "bfloat16"), "heads.precision")
    _positive("heads", checks=heads.checks)
    if heads.memory < 0:
        raise UserError(f"heads.memory is {heads.memory}; it must not be negative. 0 streams every set.")
    for name in ("linear", "upernet", "fcn"):
        head = getattr(heads, name)
        _positive(f"heads.{name}", steps=head.steps, batch=head.batch)
        if head.patience < 0:
            raise UserError(f"heads.{name}.patience is {head.patience}; it must not be negative. 0 trains all steps.")
    _positive("heads.upernet", channels=heads.upernet.channels)
    if heads.upernet.batch < 2:
        raise UserError(
            "heads.upernet.batch is 1; it must be at least 2, since BatchNorm cannot train on one sample."
        )


def _one_of(value: str, allowed: tuple[str, ...], key: str) -> None:
    if value not in allowed:
        raise UserError(f"{key} is '{value}'; it must be one of: {', '.join(allowed)}.")


def _positive(section: str, **values: int) -> None:
    for key, value in values.items():
        if value < 1:
            raise UserError(f"{section}.{key} is {value}; it must be at least 1.")


def _not_negative(key: str, value: int) -> None:
    if value < 0:
        raise UserError(f"{key} is {value}; it must not be negative.")
