"""The configuration: every section of params.yaml as a frozen, validated dataclass.

pydantic checks keys, types, bounds and allowed values, and `_check_references` the references.
Descriptions of fields appear in error messages and in the JSON schema for editors
(`python -m stages.validate --schema`). Source options and scenes are parsed by the same rules with `parse`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar

import pydantic
import yaml
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from cache import codecs
from pipeline.errors import UserError, similar_name, validation_error

FILE = "params.yaml"
SCHEMA_FILE = "params.schema.json"
T = TypeVar("T")
# Names of sources, families and units in earlier versions. They are refused with the new name.
RENAMED_VALUES = {
    "own": "custom", "landuse": "osm_landuse", "trees": "neon_trees", "raw": "band_statistics", "unit": "any",
}  # fmt: skip

RULES = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
_NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"


def _parse_number(value: object) -> object:
    """Read "1e-4" as a number: PyYAML follows YAML 1.1, where a number with an exponent needs a point."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _check_unique(values: tuple) -> tuple:
    if len(set(values)) != len(values):
        raise ValueError("list each value once")
    return values


def _check_bounds(bounds: tuple[float, ...]) -> tuple[float, ...]:
    if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1]:
        raise ValueError("it must be [low, high] with 0 < low <= high")
    return bounds


def _check_views(views: tuple[str, ...]) -> tuple[str, ...]:
    if views[:1] != ("identity",):
        raise ValueError("it must begin with identity")
    return _check_unique(views)


def _check_band_reference(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("a band is a name, or a wavelength in micrometres")
    return value


def _refuse_old_name(name: object) -> object:
    if new := RENAMED_VALUES.get(str(name)):
        raise PydanticCustomError("renamed", "it is now called {new}", {"new": new, "allowed": [new]})
    return name


_Number = BeforeValidator(_parse_number)
_Unique = AfterValidator(_check_unique)
_CurrentName = BeforeValidator(_refuse_old_name)

# Types of fields. `Float` is for every number that a YAML file may hold: it also reads "1e-4".
Float = Annotated[float, _Number]
PositiveFloat = Annotated[float, Field(gt=0), _Number]
NonNegativeFloat = Annotated[float, Field(ge=0), _Number]
PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Bounds = Annotated[
    tuple[Float, ...],
    AfterValidator(_check_bounds),
    Field(min_length=2, max_length=2, description="[low, high], searched on a logarithmic scale."),
]
UniqueNames = Annotated[tuple[str, ...], _Unique, Field(json_schema_extra={"uniqueItems": True})]
SomeNames = Annotated[tuple[str, ...], _Unique, Field(min_length=1, json_schema_extra={"uniqueItems": True})]
Name = Annotated[str, Field(pattern=_NAME)]
BandReference = Annotated[
    object, AfterValidator(_check_band_reference), pydantic.WithJsonSchema({"type": ["string", "number"]})
]
TaskName = Literal["classification", "multilabel", "segmentation"]
# The same names as VIEWS in pipeline/data/augmentation.py, a layer above (a test compares them).
ViewName = Literal["identity", "flip_x", "flip_y", "rot90", "rot180", "rot270", "transpose", "antitranspose"]
DensePrecision = Annotated[
    Literal["auto", "float32", "bfloat16"], Field(description="`auto` is bfloat16 on a GPU, else float32.")
]
Seed = Annotated[NonNegativeInt, Field(description="Seed of the random numbers.")]
Seeds = Annotated[PositiveInt, Field(description="Number of seeds. The scores of all are reported.")]
InputSize = Annotated[PositiveInt, Field(description="Side in pixels to which images are resized.")]
Arguments = Annotated[dict[str, Any], Field(description="Arguments of the constructor.")]
Steps = Annotated[PositiveInt, Field(description="Training steps, whatever the size of the dataset.")]
Batch = Annotated[PositiveInt, Field(description="Samples per step.")]
BatchNormBatch = Annotated[int, Field(ge=2, description="Samples per step; BatchNorm cannot train on one sample.")]
Patience = Annotated[
    NonNegativeInt,
    Field(description="Validation checks without a better score before a head returns to its best; 0 trains on."),
]
ValChecks = Annotated[PositiveInt, Field(description="Validation checks during training.")]

# Losses of each variant of a student, in addition to the loss on labels.
VARIANTS = {
    "distilled": ("features", "logits"),
    "features": ("features",),
    "logits": ("logits",),
    "supervised": (),
}


@dataclass(frozen=True, config=RULES)
class GridConfig:
    """Datasets, backbones, models and students to run."""

    datasets: SomeNames
    """Names of datasets, described under `datasets`."""
    backbones: SomeNames
    """Names of backbones, described under `backbones`."""
    models: SomeNames
    """Models: one backbone, or several joined by `+`. A model is skipped where a dataset lacks its bands."""
    students: UniqueNames = ()
    """Names of compact networks to distil into, described under `students`; may be empty."""
    finetune: UniqueNames = ()
    """Models whose backbones are fine-tuned too, a subset of `models`; may be empty."""


@dataclass(frozen=True, config=RULES)
class SplitFractions:
    """Fractions of the spatial blocks that go to each split; they sum to 1."""

    train: PositiveFloat
    """Fraction for training."""
    val: PositiveFloat
    """Fraction for validation."""
    test: PositiveFloat
    """Fraction for testing."""

    @pydantic.model_validator(mode="after")
    def _check_sum(self):
        if abs(self.train + self.val + self.test - 1) > 1e-6:
            raise ValueError("train, val and test must sum to 1")
        return self


@dataclass(frozen=True, config=RULES)
class DatasetConfig:
    """A dataset: one images store, prepared by a source (pipeline/data/sources)."""

    source: Annotated[str, _CurrentName]
    """Name of a source: a file or folder in pipeline/data/sources."""
    task: Literal[TaskName, ""] = ""
    """The task, for sources that cut chips. Released datasets define it themselves."""
    chip: NonNegativeInt = 0
    """Side of a chip in pixels, for sources that cut chips."""
    block: NonNegativeInt = 0
    """Side in pixels of the spatial blocks. All chips of a block go to the same split."""
    splits: SplitFractions | None = None
    """Fractions of the spatial blocks per split, for sources that cut chips."""
    seed: Seed = 0
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the source, declared in its file."""

    @pydantic.field_validator("block")
    @classmethod
    def _check_block(cls, block: int, info: pydantic.ValidationInfo) -> int:
        chip = info.data.get("chip", 0)
        if chip and block % chip:
            raise ValueError(f"it must be a multiple of chip ({chip}), or a chip would lie in two blocks")
        return block


@dataclass(frozen=True, config=RULES)
class HubFile:
    """One file of a repository on the Hugging Face hub, at a pinned commit."""

    repo: str
    """owner/name."""
    file: str
    """Path of the file in the repository."""
    revision: str
    """The commit, 40 hexadecimal digits."""
    sha256: str = ""
    """SHA-256 of the file; if the publisher states none, it is empty, and the digest is recorded, not checked."""
    size: int = 0
    """Approximate size in bytes, for messages."""
    licence: str = "see the repository"
    """Licence, written into every store made with the file."""

    @property
    def address(self) -> str:
        return f"https://huggingface.co/{self.repo}/resolve/{self.revision}/{self.file}"


@dataclass(frozen=True, config=RULES)
class BackboneConfig:
    """A frozen backbone: one feature store per dataset.

    `input_units`, `layers` and `options` are for the families timm and terratorch; other families define their own.
    """

    family: Annotated[str, _CurrentName]
    """Name of a family: a file in pipeline/backbones."""
    variant: str
    """Name of the network within the family."""
    weights: Literal["pretrained", "random", "none"]
    """`pretrained`; `random`, a control drawn from `seed`; or `none` if the family has no weights."""
    input_size: InputSize
    seed: Seed = 0
    normalisation: Literal["native", "dataset"] = "native"
    """Mean and standard deviation: `native`, those of pretraining, or `dataset`, those of the training split."""
    bands: tuple[BandReference, ...] = ()
    """Bands to use instead of the backbone's own, in the order of its inputs: names, or wavelengths in µm."""
    hub: HubFile | None = None
    """Another file of weights."""
    input_units: Annotated[Literal["reflectance", "display", "any", ""], _CurrentName] = ""
    """Expected units of the input: `reflectance` (0 to 1), `display` (an RGB image in [0, 1]) or `any` of them."""
    layers: tuple[int, ...] = ()
    """Indices of the network's outputs to use as levels, in increasing order; docs/foundation-models.md."""
    wavelengths: Literal["pretraining", "terratorch", "image"] = "pretraining"
    """Of DOFA's bands: `pretraining`, where the sensor is known, `terratorch` (its table), or the `image`'s own."""
    options: Arguments = field(default_factory=dict)


@dataclass(frozen=True, config=RULES)
class ExtractConfig:
    """How features are computed and stored."""

    dtype: Literal["float16", "float32"]
    """Type of the stored features."""
    codec: str
    """Compression: none, lz4, zstd or int8 (cache/README.md)."""
    precision: Literal["float32", "bfloat16", "float16"]
    """Precision of the forward pass."""
    compiled: bool
    """Whether to use torch.compile."""
    batch: NonNegativeInt
    """Images per forward pass, at most `shard`; 0 finds the fastest."""
    shard: PositiveInt
    """Samples per shard, the unit of work and of files."""
    keep_levels: bool
    """Whether to store the levels of classification datasets too, not only pooled features."""
    views: Annotated[tuple[ViewName, ...], AfterValidator(_check_views)]
    """Augmented copies of each image to encode. The first is `identity`, on which heads are trained."""

    @pydantic.field_validator("codec")
    @classmethod
    def _check_codec(cls, codec: str) -> str:
        codecs.parse_codec(codec)
        return codec


@dataclass(frozen=True, config=RULES)
class LinearHeadConfig:
    """Linear head on pooled features, for classification and multi-label tasks."""

    pooled: Literal["last", "all"]
    """Pooled features to use: of the `last` (deepest) level of each backbone, or of `all` levels, concatenated."""
    tokens: Literal["mean", "cls", "both"]
    """Pooled features of transformers: the `mean` of the patch tokens, the `cls` token, or `both`."""
    steps: Steps
    batch: Batch
    patience: Patience = 0


@dataclass(frozen=True, config=RULES)
class UPerNetHeadConfig:
    """UPerNet on the levels, for segmentation."""

    channels: PositiveInt
    """Width of the decoder."""
    steps: Steps
    batch: BatchNormBatch
    patience: Patience = 0
    neck: bool = True
    """Whether to resample a transformer's levels, all of one grid, to a pyramid first, as terratorch does."""


@dataclass(frozen=True, config=RULES)
class FcnHeadConfig:
    """Linear classifier on each cell of every level: the cheap probe of segmentation."""

    steps: Steps = 400
    batch: Batch = 8
    patience: Patience = 0


@dataclass(frozen=True, config=RULES)
class CustomHeadConfig:
    """Settings of a head that was added to the registry of pipeline/heads."""

    steps: Steps
    batch: Batch
    patience: Patience = 0
    neck: bool = False
    """Resample the levels of a transformer, which all have one grid, to a pyramid first."""
    options: Arguments = field(default_factory=dict)


HeadSettings = LinearHeadConfig | UPerNetHeadConfig | FcnHeadConfig | CustomHeadConfig


@dataclass(frozen=True, config=RULES)
class HeadsConfig:
    """Heads on frozen features."""

    linear: LinearHeadConfig
    upernet: UPerNetHeadConfig
    fcn: FcnHeadConfig = FcnHeadConfig()
    segmentation: str = "upernet"
    """Head of segmentation tasks: upernet, fcn, or one of `custom`."""
    fusion: str = "concat"
    """How the features of several backbones are combined: concat, average, film or dot."""
    levels: tuple[int, ...] = ()
    """Indices of the levels to use, 0 the finest, -1 the deepest; empty for all."""
    class_weights: Literal["none", "balanced"] = "none"
    """Weights of classes in the loss: `balanced` by their frequency in training (not for multi-label tasks)."""
    val_checks: ValChecks = 10
    precision: DensePrecision = "auto"
    max_feature_gb: NonNegativeFloat = 4.0
    """Features of more gigabytes are streamed from disk; 0 streams every dataset."""
    custom: dict[Name, CustomHeadConfig] = field(default_factory=dict)
    """Settings of further heads, by their name in the registry of pipeline/heads."""

    @pydantic.field_validator("custom")
    @classmethod
    def _has_other_names(cls, custom: dict[str, CustomHeadConfig]) -> dict[str, CustomHeadConfig]:
        if reserved := sorted({"linear", "upernet", "fcn"} & set(custom)):
            raise ValueError(f"{reserved[0]} has a section of its own under heads; remove it here")
        return custom

    def settings(self, head: str) -> HeadSettings:
        """Return the settings of a head by its name; UserError if params.yaml has none."""
        settings: dict[str, HeadSettings] = dict(
            linear=self.linear, upernet=self.upernet, fcn=self.fcn, **self.custom
        )
        if head not in settings:
            raise UserError(
                f"{FILE}: there are no settings for the head '{head}', only for: {', '.join(settings)}. "
                f"Write its steps and batch under 'heads: custom: {head}:'.",
                key=f"heads.custom.{head}", allowed=settings, path=FILE,
            )  # fmt: skip
        return settings[head]


@dataclass(frozen=True, config=RULES)
class SearchConfig:
    """Search for a learning rate and a weight decay: random trials first, then the TPE sampler."""

    trials: PositiveInt
    """Number of trials."""
    trials_per_round: PositiveInt
    """Trials that are proposed together and trained in one pass over the features."""
    seed: Seed
    learning_rate: Bounds
    weight_decay: Bounds


@dataclass(frozen=True, config=RULES)
class TrainConfig:
    """The final training of a head."""

    seeds: Seeds


@dataclass(frozen=True, config=RULES)
class CompositionConfig:
    """Search over ensembles of backbones."""

    backbones: UniqueNames
    """Backbones whose subsets are all probed on validation; empty for all of the grid except random controls."""
    probe: Literal["logistic", "knn"]
    """The probe. Segmentation datasets always use logistic regression on pixels."""
    top_k: NonNegativeInt
    """How many of the best ensembles are trained by the full protocol."""
    greedy: bool
    """Whether to also add layers one by one for as long as the validation score rises."""


@dataclass(frozen=True, config=RULES)
class FineTuneConfig:
    """Fine-tuning of backbones, starting from the frozen model and its best head."""

    method: Annotated[str, Field(pattern=r"^(all|lora|last[1-9][0-9]*)$")] = "all"
    """Trained parameters: `all`; `lora` (adapters); or `last<n>`, the last n blocks, such as `last2`."""
    rank: PositiveInt = 8
    """Rank of LoRA adapters."""
    learning_rates: Annotated[tuple[PositiveFloat, ...], Field(min_length=1), _Unique] = (3e-5, 3e-4)
    """Learning rates of the head and of adapters. The first seed tries each; the best on validation is used."""
    layer_decay: Annotated[float, Field(gt=0, le=1), _Number] = 0.75
    """Factor on the learning rate from each block to the one before it. Adapters have the full rate."""
    weight_decay: NonNegativeFloat = 0.05
    """Weight decay of AdamW; not applied to biases and normalisation layers."""
    steps: Steps = 200
    batch: Batch = 16
    val_checks: ValChecks = 10
    seeds: Seeds = 3
    augment: bool = True
    """Whether to flip and rotate images and masks at random."""
    checkpointing: bool = False
    """Whether to recompute activations in the backward pass instead of storing them."""
    precision: DensePrecision = "auto"

    @property
    def n_last_blocks(self) -> int:
        """Number of last blocks that are trained; 0 if `method` is not `last<n>`."""
        match = re.fullmatch(r"last(\d+)", self.method)
        return int(match[1]) if match else 0

    @property
    def protocol(self) -> str:
        """Name of the protocol in tables of results."""
        return f"fine-tuned ({f'last {self.n_last_blocks} blocks' if self.n_last_blocks else self.method})"


@dataclass(frozen=True, config=RULES)
class ComputeConfig:
    """Devices and processes that run backbones."""

    device: Literal["auto", "cpu", "cuda"]
    """`auto` uses a GPU if one is available."""
    workers: NonNegativeInt
    """Extraction processes on this machine, one per GPU; 0 extracts in the process of the stage."""
    scheduler: str
    """Address of a Dask scheduler whose workers extract instead, such as tcp://10.0.0.1:8786; or empty."""


@dataclass(frozen=True, config=RULES)
class StudentConfig:
    """A compact timm network, with as many input bands as the images have."""

    network: str
    """timm's name of the network."""
    weights: str
    """`random`, or a backbone of the grid with the same network, whose trained weights are the start."""
    chip_size: InputSize
    mask_size: InputSize
    """Side in pixels to which images of segmentation datasets are resized."""


@dataclass(frozen=True, config=RULES)
class StepsConfig:
    """Length of a training."""

    steps: Steps
    batch: BatchNormBatch


@dataclass(frozen=True, config=RULES)
class LossWeights:
    """Weights of the three losses of a student."""

    labels: PositiveFloat
    """Loss on labels. It must be above 0: the supervised baseline has no other loss."""
    features: NonNegativeFloat
    """Distance to the teacher's features."""
    logits: NonNegativeFloat
    """Distance to the teacher's logits."""


@dataclass(frozen=True, config=RULES)
class DistillConfig:
    """Distillation of a teacher model into students.

    Each student is trained twice: distilled (labels, features and logits) and supervised (labels only).
    """

    datasets: UniqueNames
    """Datasets of the grid on which students are trained; empty for all."""
    teacher: str
    """A model of the grid, or `best`: the one with the best validation score that has a trained network."""
    loss_weights: LossWeights
    temperature: PositiveFloat
    """Temperature of the logits."""
    extra_variants: Annotated[tuple[Literal["features", "logits"], ...], _Unique]
    """Ablations to train as well: `features` (labels and features) and `logits` (labels and logits)."""
    classification: StepsConfig
    """Length of training on classification and multi-label datasets."""
    segmentation: StepsConfig
    """Length of training on segmentation datasets."""
    seeds: Seeds
    search: SearchConfig

    def applies_to(self, dataset: str) -> bool:
        """Return whether students are trained on a dataset."""
        return not self.datasets or dataset in self.datasets

    @property
    def variants(self) -> list[str]:
        """Names of the variants that are trained."""
        return [name for name in VARIANTS if name in ("distilled", "supervised", *self.extra_variants)]


_ReadOnly = AfterValidator(MappingProxyType)


@dataclass(frozen=True, config=RULES)
class Params:
    """All of params.yaml."""

    grid: GridConfig
    datasets: Annotated[dict[Name, DatasetConfig], _ReadOnly]
    """Datasets by name."""
    backbones: Annotated[dict[Name, BackboneConfig], _ReadOnly]
    """Backbones by name."""
    weights_dir: str
    """Folder that is searched for official weights before they are downloaded."""
    extract: ExtractConfig
    heads: HeadsConfig
    search: SearchConfig
    train: TrainConfig
    composition: CompositionConfig
    compute: ComputeConfig
    students: Annotated[dict[Name, StudentConfig], _ReadOnly]
    """Compact networks by name."""
    distill: DistillConfig
    geobench_dir: str = "data/geobench"
    """Folder of GEO-Bench, as unpacked from the hub; downloaded there if absent, and read in place."""
    finetune: FineTuneConfig = field(default_factory=FineTuneConfig)

    def dataset(self, name: str) -> DatasetConfig:
        return _described(self.datasets, name, "dataset", "datasets")

    def backbone(self, name: str) -> BackboneConfig:
        return _described(self.backbones, name, "backbone", "backbones")

    def student(self, name: str) -> StudentConfig:
        return _described(self.students, name, "student", "students")

    def composition_backbones(self) -> list[str]:
        """Return the names of the backbones whose ensembles are searched."""
        trained = [name for name in self.grid.backbones if self.backbone(name).weights != "random"]
        return list(self.composition.backbones) or trained

    def members(self, model: str) -> list[str]:
        """Return the backbones of a model such as `a+b`; UserError if one is not described, or named twice."""
        names = model.split("+")
        for name in names:
            self.backbone(name)
        if len(set(names)) != len(names):
            raise UserError(f"Model '{model}' names a backbone twice.", key="grid.models", value=model)
        return names


def load(path: Path | str = FILE) -> Params:
    """Read and check params.yaml; UserError for every mistake, also in references between sections."""
    if not Path(path).exists():
        raise UserError(f"There is no {path} here. Run from the root of the repository.", path=path)
    params = parse(Params, read_yaml(path), path=path)
    _check_references(params, path)
    return params


def read_yaml(path: Path | str) -> object:
    """Read a YAML file; UserError if it is not valid YAML."""
    try:
        return yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}", path=path) from None


def parse(model: type[T], raw: object, section: str = "", path: Path | str | None = None) -> T:
    """Turn plain YAML data into a dataclass, strictly: no unknown keys, no conversion between types.

    Args:
        section: dotted key of `raw` in its file, for messages, such as `datasets.x.options`.

    Raises:
        UserError: the first mistakes, with key, value and what is allowed.
    """
    try:
        text = json.dumps(raw)
    except (TypeError, ValueError, RecursionError) as error:  # ValueError: an alias that contains itself
        prefix = ": ".join(str(part) for part in (path, section) if part)
        raise UserError(
            f"{prefix}: use text, numbers, lists and mappings only ({error}). Quote dates and times.",
            key=section or None, value=raw, path=path,
        ) from None  # fmt: skip
    try:
        # JSON, since pydantic's strict mode for Python objects would refuse lists for tuples.
        return TypeAdapter(model).validate_json(text, strict=True, extra="forbid")
    except pydantic.ValidationError as error:
        raise validation_error(error, model, section, path) from None


def json_schema() -> str:
    """Return the JSON schema of params.yaml, for editors."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **TypeAdapter(Params).json_schema()}
    return json.dumps(schema | {"title": FILE}, indent=1, sort_keys=True) + "\n"


def _described(table: Mapping[str, T], name: str, noun: str, section: str) -> T:
    if name not in table:
        raise UserError(
            f"There is no {noun} '{name}'. {FILE} describes: {', '.join(table) or 'none'}."
            f"{similar_name(name, table)} Use one of these, or describe '{name}' under '{section}:' first.",
            key=section, value=name, allowed=table, path=FILE,
        )  # fmt: skip
    return table[name]


def _check_references(params: Params, path: Path | str) -> None:
    """Check every name that refers to another section."""
    grid = params.grid
    for name in (*grid.datasets, *params.distill.datasets):
        params.dataset(name)
    for name in (*grid.backbones, *params.composition.backbones):
        params.backbone(name)
    models: dict[frozenset, str] = {}
    for model in grid.models:
        other = models.setdefault(frozenset(params.members(model)), model)
        if other != model:
            message = f"{path}: grid.models: '{other}' and '{model}' are the same ensemble. Name it once."
            raise UserError(message, key="grid.models", value=model, path=path)

    def check(key: str, value: str, allowed: Sequence[str], reason: str, name: str | None = None) -> None:
        if (name or value) not in allowed:
            raise UserError(
                f"{path}: {key}: '{name or value}' is not one of {', '.join(allowed)}, so {reason}.",
                key=key, value=value, allowed=allowed, path=path,
            )  # fmt: skip

    for model in grid.models:
        for name in params.members(model):
            check("grid.models", model, grid.backbones, "nothing would extract its features", name)
    for model in grid.finetune:
        check("grid.finetune", model, grid.models, "it has no head to start from")
    for name in params.composition.backbones:
        check("composition.backbones", name, grid.backbones, "nothing would extract its features")
    check("distill.teacher", params.distill.teacher, ("best", *grid.models), "it has no trained head")
    trained = [name for name in grid.backbones if params.backbone(name).weights == "pretrained"]
    for name in grid.students:
        weights = params.student(name).weights
        check(f"students.{name}.weights", weights, ("random", *trained), "it has no trained weights to start from")
