"""The configuration: every section of params.yaml as a frozen, validated dataclass.

`load` reads params.yaml and checks it: keys, types, bounds and allowed values by pydantic, references between
sections by `_check_references`. Every mistake becomes a `UserError` with the file, the key, its value and what is
allowed. The docstring below a field is its description, in error messages and in the JSON schema for editors
(`python -m stages.validate --schema`).

Source options and scene descriptions are parsed by the same rules with `parse`.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import field
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic.dataclasses import dataclass

from cache import codecs
from pipeline.errors import UserError, similar_name, validation_error

FILE = "params.yaml"
SCHEMA_FILE = "params.schema.json"
T = TypeVar("T")

_RULES = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
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


_Number = BeforeValidator(_parse_number)
_Unique = AfterValidator(_check_unique)

# Types of fields. `Float` is for every number that a YAML file may hold: it also reads "1e-4".
Float = Annotated[float, _Number]
PositiveFloat = Annotated[float, Field(gt=0), _Number]
NonNegativeFloat = Annotated[float, Field(ge=0), _Number]
PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
# BatchNorm cannot train on one sample.
BatchNormBatch = Annotated[int, Field(ge=2)]
Bounds = Annotated[tuple[Float, ...], AfterValidator(_check_bounds), Field(min_length=2, max_length=2)]
UniqueNames = Annotated[tuple[str, ...], _Unique, Field(json_schema_extra={"uniqueItems": True})]
SomeNames = Annotated[tuple[str, ...], _Unique, Field(min_length=1, json_schema_extra={"uniqueItems": True})]
Name = Annotated[str, Field(pattern=_NAME)]
BandReference = Annotated[
    object, AfterValidator(_check_band_reference), WithJsonSchema({"type": ["string", "number"]})
]
TaskName = Literal["classification", "multilabel", "segmentation"]
# The same names as VIEWS in pipeline/data/augmentation.py, a layer above (a test compares them).
ViewName = Literal["identity", "flip_x", "flip_y", "rot90", "rot180", "rot270", "transpose", "antitranspose"]
DensePrecision = Literal["auto", "float32", "bfloat16"]

# Losses of each variant of a student, in addition to the loss on labels.
VARIANTS = {
    "distilled": ("features", "logits"),
    "features": ("features",),
    "logits": ("logits",),
    "supervised": (),
}


@dataclass(frozen=True, config=_RULES)
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


@dataclass(frozen=True, config=_RULES)
class SplitFractions:
    """Fractions of the spatial blocks that go to each split; they sum to 1."""

    train: PositiveFloat
    """Fraction for training."""
    val: PositiveFloat
    """Fraction for validation."""
    test: PositiveFloat
    """Fraction for testing."""

    @model_validator(mode="after")
    def _check_sum(self):
        if abs(self.train + self.val + self.test - 1) > 1e-6:
            raise ValueError("train, val and test must sum to 1")
        return self


@dataclass(frozen=True, config=_RULES)
class DatasetConfig:
    """A dataset: one images store, prepared by a source (pipeline/data/sources)."""

    source: str
    """Name of a source: a file or folder in pipeline/data/sources."""
    task: Literal[TaskName, ""] = ""
    """The task, for sources that cut chips. Released datasets define it themselves."""
    chip: NonNegativeInt = 0
    """Side of a chip in pixels, for sources that cut chips."""
    block: NonNegativeInt = 0
    """Side in pixels of the spatial blocks. All chips of a block go to the same split."""
    splits: SplitFractions | None = None
    """Fractions of the spatial blocks per split, for sources that cut chips."""
    seed: NonNegativeInt = 0
    """Seed of the assignment of blocks to splits."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the source, declared in its file."""

    @field_validator("block")
    @classmethod
    def _check_block(cls, block: int, info: ValidationInfo) -> int:
        chip = info.data.get("chip", 0)
        if chip and block % chip:
            raise ValueError(f"it must be a multiple of chip ({chip}), or a chip would lie in two blocks")
        return block


@dataclass(frozen=True, config=_RULES)
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


@dataclass(frozen=True, config=_RULES)
class BackboneConfig:
    """A frozen backbone: one feature store per dataset.

    `input_units`, `layers` and `options` are for the families timm and terratorch; other families define their own.
    """

    family: str
    """Name of a family: a file in pipeline/backbones."""
    variant: str
    """Name of the network within the family."""
    weights: Literal["pretrained", "random", "none"]
    """`pretrained`; `random`, a control drawn from `seed`; or `none` if the family has no weights."""
    input_size: PositiveInt
    """Side in pixels to which images are resized."""
    seed: NonNegativeInt = 0
    """Seed of random weights."""
    normalisation: Literal["native", "dataset"] = "native"
    """Mean and standard deviation: `native`, those of pretraining, or `dataset`, those of the training split."""
    bands: tuple[BandReference, ...] = ()
    """Bands to use instead of the backbone's own, in the order of its inputs: names, or wavelengths in µm."""
    hub: HubFile | None = None
    """Another file of weights."""
    input_units: Literal["reflectance", "display", "any", ""] = ""
    """Expected units of the input: `reflectance` (0 to 1), `display` (an RGB image in [0, 1]) or `any` of them."""
    layers: tuple[int, ...] = ()
    """Indices of the network's outputs to use as levels."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the network's constructor."""


@dataclass(frozen=True, config=_RULES)
class ExtractConfig:
    """How features are computed and stored."""

    dtype: Literal["float16", "float32"]
    """Type of the stored features."""
    codec: str
    """Compression: none, lz4, zstd, bitround<mantissa bits> or int8 (cache/README.md)."""
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

    @field_validator("codec")
    @classmethod
    def _check_codec(cls, codec: str, info: ValidationInfo) -> str:
        codecs.parse_codec(codec, info.data.get("dtype", "float32"))
        return codec


@dataclass(frozen=True, config=_RULES)
class LinearHeadConfig:
    """Linear head on pooled features, for classification and multi-label tasks."""

    pooled: Literal["last", "all"]
    """Pooled features to use: of the `last` (deepest) level of each backbone, or of `all` levels, concatenated."""
    tokens: Literal["mean", "cls", "both"]
    """Pooled features of transformers: the `mean` of the patch tokens, the `cls` token, or `both`."""
    steps: PositiveInt
    """Training steps, whatever the size of the dataset."""
    batch: PositiveInt
    """Samples per step."""
    patience: NonNegativeInt = 0
    """Validation checks without a better score before a head stops and returns to its best; 0 trains all steps."""


@dataclass(frozen=True, config=_RULES)
class UPerNetHeadConfig:
    """UPerNet on the levels, for segmentation."""

    channels: PositiveInt
    """Width of the decoder."""
    steps: PositiveInt
    """Training steps, whatever the size of the dataset."""
    batch: BatchNormBatch
    """Samples per step; BatchNorm cannot train on one sample."""
    patience: NonNegativeInt = 0
    """Validation checks without a better score before a head stops and returns to its best; 0 trains all steps."""
    neck: bool = True
    """Whether to resample a transformer's levels, all of one grid, to a pyramid first, as terratorch does."""


@dataclass(frozen=True, config=_RULES)
class FcnHeadConfig:
    """Linear classifier on each cell of every level: the cheap probe of segmentation."""

    steps: PositiveInt = 400
    """Training steps, whatever the size of the dataset."""
    batch: PositiveInt = 8
    """Samples per step."""
    patience: NonNegativeInt = 0
    """Validation checks without a better score before a head stops and returns to its best; 0 trains all steps."""


@dataclass(frozen=True, config=_RULES)
class CustomHeadConfig:
    """Settings of a head that was added to the registry of pipeline/heads."""

    steps: PositiveInt
    """Training steps, whatever the size of the dataset."""
    batch: PositiveInt
    """Samples per step."""
    patience: NonNegativeInt = 0
    """Validation checks without a better score before a head stops and returns to its best; 0 trains all steps."""
    neck: bool = False
    """Resample the levels of a transformer, which all have one grid, to a pyramid first."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the head's constructor."""


HeadSettings = LinearHeadConfig | UPerNetHeadConfig | FcnHeadConfig | CustomHeadConfig


@dataclass(frozen=True, config=_RULES)
class HeadsConfig:
    """Heads on frozen features."""

    linear: LinearHeadConfig
    """The linear head."""
    upernet: UPerNetHeadConfig
    """The UPerNet head."""
    fcn: FcnHeadConfig = FcnHeadConfig()
    """The FCN head."""
    segmentation: str = "upernet"
    """Head of segmentation tasks: upernet, fcn, or one of `custom`."""
    fusion: str = "concat"
    """How the features of several backbones are combined: concat, average, film or dot."""
    levels: tuple[int, ...] = ()
    """Indices of the levels to use, 0 the finest, -1 the deepest; empty for all."""
    class_weights: Literal["none", "balanced"] = "none"
    """Weights of classes in the loss: `balanced` by their frequency in training (not for multi-label tasks)."""
    val_checks: PositiveInt = 10
    """Validation checks during training, for heads with patience."""
    precision: DensePrecision = "auto"
    """Precision of dense heads; `auto` is bfloat16 on a GPU, else float32."""
    max_feature_gb: NonNegativeFloat = 4.0
    """Features of more gigabytes are streamed from disk; 0 streams every dataset."""
    custom: dict[Name, CustomHeadConfig] = field(default_factory=dict)
    """Settings of further heads, by their name in the registry of pipeline/heads."""

    @field_validator("custom")
    @classmethod
    def _has_other_names(cls, custom: dict[str, CustomHeadConfig]) -> dict[str, CustomHeadConfig]:
        if reserved := sorted({"linear", "upernet", "fcn"} & set(custom)):
            raise ValueError(f"{reserved[0]} has a section of its own under heads; remove it here")
        return custom

    def settings(self, head: str) -> HeadSettings:
        """Return the settings of a head by its name.

        Raises:
            UserError: params.yaml has no settings for it.
        """
        settings: dict[str, HeadSettings] = {
            "linear": self.linear,
            "upernet": self.upernet,
            "fcn": self.fcn,
            **self.custom,
        }
        if head not in settings:
            raise UserError(
                f"{FILE}: there are no settings for the head '{head}', only for: {', '.join(settings)}. "
                f"Write its steps and batch under 'heads: custom: {head}:'.",
                key=f"heads.custom.{head}",
                allowed=settings,
                path=FILE,
            )
        return settings[head]


@dataclass(frozen=True, config=_RULES)
class SearchConfig:
    """Search for a learning rate and a weight decay: random trials first, then the TPE sampler."""

    trials: PositiveInt
    """Number of trials."""
    trials_per_round: PositiveInt
    """Trials that are proposed together and trained in one pass over the features."""
    seed: NonNegativeInt
    """Seed of the sampler."""
    learning_rate: Bounds
    """[low, high], searched on a logarithmic scale."""
    weight_decay: Bounds
    """[low, high], searched on a logarithmic scale."""


@dataclass(frozen=True, config=_RULES)
class TrainConfig:
    """The final training of a head."""

    seeds: PositiveInt
    """Number of seeds, each scored once on the test split."""


@dataclass(frozen=True, config=_RULES)
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


@dataclass(frozen=True, config=_RULES)
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
    steps: PositiveInt = 200
    """Training steps."""
    batch: PositiveInt = 16
    """Images per step."""
    val_checks: PositiveInt = 10
    """Validation checks during training; each also writes a checkpoint."""
    seeds: PositiveInt = 3
    """Number of seeds. A seed sets the order of images, their augmentation, and the initial adapters."""
    augment: bool = True
    """Whether to flip and rotate images and masks at random."""
    checkpointing: bool = False
    """Whether to recompute activations in the backward pass instead of storing them."""
    precision: DensePrecision = "auto"
    """Precision of the backbones; `auto` is bfloat16 on a GPU, else float32."""

    @property
    def n_last_blocks(self) -> int:
        """Number of last blocks that are trained; 0 if `method` is not `last<n>`."""
        match = re.fullmatch(r"last(\d+)", self.method)
        return int(match[1]) if match else 0

    @property
    def protocol(self) -> str:
        """Name of the protocol in tables of results."""
        return f"fine-tuned ({f'last {self.n_last_blocks} blocks' if self.n_last_blocks else self.method})"


@dataclass(frozen=True, config=_RULES)
class ComputeConfig:
    """Devices and processes that run backbones."""

    device: Literal["auto", "cpu", "cuda"]
    """`auto` uses a GPU if one is available."""
    workers: NonNegativeInt
    """Extraction processes on this machine, one per GPU; 0 extracts in the process of the stage."""
    scheduler: str
    """Address of a Dask scheduler whose workers extract instead, such as tcp://10.0.0.1:8786; or empty."""


@dataclass(frozen=True, config=_RULES)
class StudentConfig:
    """A compact timm network, with as many input bands as the images have."""

    network: str
    """timm's name of the network."""
    weights: str
    """`random`, or a backbone of the grid with the same network, whose trained weights are the start."""
    chip_size: PositiveInt
    """Side in pixels to which classification images are resized inside the student."""
    mask_size: PositiveInt
    """Side in pixels to which segmentation images are resized inside the student."""


@dataclass(frozen=True, config=_RULES)
class StepsConfig:
    """Length of a training."""

    steps: PositiveInt
    """Training steps, whatever the size of the dataset."""
    batch: BatchNormBatch
    """Images per step; BatchNorm cannot train on one sample."""


@dataclass(frozen=True, config=_RULES)
class LossWeights:
    """Weights of the three losses of a student."""

    labels: PositiveFloat
    """Loss on labels. It must be above 0: the supervised baseline has no other loss."""
    features: NonNegativeFloat
    """Distance to the teacher's features."""
    logits: NonNegativeFloat
    """Distance to the teacher's logits."""


@dataclass(frozen=True, config=_RULES)
class DistillConfig:
    """Distillation of a teacher model into students.

    Each student is trained twice: distilled (labels, features and logits) and supervised (labels only).
    """

    datasets: UniqueNames
    """Datasets of the grid on which students are trained; empty for all."""
    teacher: str
    """A model of the grid, or `best`: the one with the best validation score that has a trained network."""
    loss_weights: LossWeights
    """Weights of the losses."""
    temperature: PositiveFloat
    """Temperature of the logits."""
    extra_variants: Annotated[tuple[Literal["features", "logits"], ...], _Unique]
    """Ablations to train as well: `features` (labels and features) and `logits` (labels and logits)."""
    classification: StepsConfig
    """Length of training on classification and multi-label datasets."""
    segmentation: StepsConfig
    """Length of training on segmentation datasets."""
    seeds: PositiveInt
    """Number of seeds."""
    search: SearchConfig
    """Search for a learning rate and a weight decay."""

    def applies_to(self, dataset: str) -> bool:
        """Return whether students are trained on a dataset."""
        return not self.datasets or dataset in self.datasets

    @property
    def variants(self) -> list[str]:
        """Names of the variants that are trained."""
        return [name for name in VARIANTS if name in ("distilled", "supervised", *self.extra_variants)]


_Datasets = Annotated[dict[Name, DatasetConfig], AfterValidator(MappingProxyType)]
_Backbones = Annotated[dict[Name, BackboneConfig], AfterValidator(MappingProxyType)]
_Students = Annotated[dict[Name, StudentConfig], AfterValidator(MappingProxyType)]


@dataclass(frozen=True, config=_RULES)
class Params:
    """All of params.yaml."""

    grid: GridConfig
    """Names of the datasets, backbones, models and students to run, described in the sections below."""
    datasets: _Datasets
    """Datasets by name."""
    backbones: _Backbones
    """Backbones by name."""
    weights_dir: str
    """Folder that is searched for official weights before they are downloaded."""
    extract: ExtractConfig
    """Extraction of features."""
    heads: HeadsConfig
    """Heads on frozen features."""
    search: SearchConfig
    """Search for the hyperparameters of heads."""
    train: TrainConfig
    """The final training of heads."""
    composition: CompositionConfig
    """Search over ensembles of backbones."""
    compute: ComputeConfig
    """Devices and processes."""
    students: _Students
    """Compact networks by name."""
    distill: DistillConfig
    """Distillation."""
    geobench_dir: str = "data/geobench"
    """Folder of GEO-Bench, as unpacked from the hub; downloaded there if absent, and read in place."""
    finetune: FineTuneConfig = field(default_factory=FineTuneConfig)
    """Fine-tuning of backbones."""

    def dataset(self, name: str) -> DatasetConfig:
        """Return a dataset's section; UserError if there is none."""
        return _described(self.datasets, name, "dataset", "datasets")

    def backbone(self, name: str) -> BackboneConfig:
        """Return a backbone's section; UserError if there is none."""
        return _described(self.backbones, name, "backbone", "backbones")

    def student(self, name: str) -> StudentConfig:
        """Return a student's section; UserError if there is none."""
        return _described(self.students, name, "student", "students")

    def composition_backbones(self) -> list[str]:
        """Return the names of the backbones whose ensembles are searched."""
        trained = [name for name in self.grid.backbones if self.backbone(name).weights != "random"]
        return list(self.composition.backbones) or trained

    def members(self, model: str) -> list[str]:
        """Return the backbone names of a model such as `csmask_b4+lite0`.

        Raises:
            UserError: a backbone that is not described, or one named twice.
        """
        names = model.split("+")
        for name in names:
            self.backbone(name)
        if len(set(names)) != len(names):
            raise UserError(
                f"Model '{model}' names a backbone twice. Name each once.", key="grid.models", value=model
            )
        return names


# Keys and values of earlier versions, with `*` for any name. They are refused with the new name.
RENAMED_KEYS = {
    "extract.dense": "extract.keep_levels",
    "heads.memory": "heads.max_feature_gb",
    "heads.checks": "heads.val_checks",
    "search.parallel": "search.trials_per_round",
    "distill.search.parallel": "distill.search.trials_per_round",
    "compose": "composition",
    "composition.best": "composition.top_k",
    "finetune.what": "finetune.method",
    "finetune.decay": "finetune.layer_decay",
    "finetune.checks": "finetune.val_checks",
    "distill.labels": "distill.loss_weights.labels",
    "distill.features": "distill.loss_weights.features",
    "distill.logits": "distill.loss_weights.logits",
    "distill.ablation": "distill.extra_variants",
    "distill.chips": "distill.classification",
    "distill.masks": "distill.segmentation",
    "backbones.*.eats": "backbones.*.input_units",
    "datasets.*.options.as_labelled": "datasets.*.options.keep_released_metadata",
}
RENAMED_VALUES = {
    ("datasets.*.source", "own"): "custom",
    ("datasets.*.source", "landuse"): "osm_landuse",
    ("datasets.*.source", "trees"): "neon_trees",
    ("backbones.*.family", "raw"): "band_statistics",
    ("backbones.*.input_units", "unit"): "any",
}


def load(path: Path | str = FILE) -> Params:
    """Read and check params.yaml.

    Raises:
        UserError: unreadable file, unknown or missing key, wrong type, value out of bounds, or a reference to
            something that is not described.
    """
    if not Path(path).exists():
        raise UserError(f"There is no {path} here. Run from the root of the repository.", path=path)
    raw = read_yaml(path)
    _refuse_renamed(raw, path)
    params = parse(Params, raw, path=path)
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
        model: a dataclass, nested ones included.
        raw: mappings, lists, numbers and text, as PyYAML returns them.
        section: dotted key of `raw` in its file, for messages, such as `datasets.x.options`.
        path: the file, for messages.

    Raises:
        UserError: the first mistakes, with key, value and what is allowed.
    """
    try:
        text = json.dumps(raw)
    except (TypeError, ValueError, RecursionError) as error:  # ValueError: an alias that contains itself
        prefix = ": ".join(str(part) for part in (path, section) if part)
        raise UserError(
            f"{prefix}: use text, numbers, lists and mappings only ({error}). Quote dates and times.",
            key=section or None,
            value=raw,
            path=path,
        ) from None
    try:
        # JSON, since pydantic's strict mode for Python objects would refuse lists for tuples.
        return TypeAdapter(model).validate_json(text, strict=True, extra="forbid")
    except ValidationError as error:
        raise validation_error(error, model, section, path) from None


def json_schema() -> str:
    """Return the JSON schema of params.yaml, for editors."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **TypeAdapter(Params).json_schema(),
        "title": FILE,
    }
    return json.dumps(schema, indent=1, sort_keys=True) + "\n"


def _described(table: Mapping[str, T], name: str, noun: str, section: str) -> T:
    if name not in table:
        raise UserError(
            f"There is no {noun} '{name}'. {FILE} describes: {', '.join(table) or 'none'}."
            f"{similar_name(name, table)} Use one of these, or describe '{name}' under '{section}:' first.",
            key=section,
            value=name,
            allowed=table,
            path=FILE,
        )
    return table[name]


def _check_references(params: Params, path: Path | str) -> None:
    """Check every name that refers to another section.

    Raises:
        UserError: the key, the name, and the names that may be used.
    """

    def refuse(key: str, value: object, message: str, allowed=None) -> None:
        raise UserError(f"{path}: {key}: {message}", key=key, value=value, allowed=allowed, path=path)

    grid = params.grid
    for name in grid.datasets:
        params.dataset(name)
    for name in grid.backbones:
        params.backbone(name)
    for name in grid.students:
        params.student(name)

    ensembles: dict[frozenset, str] = {}
    for model in grid.models:
        members = frozenset(params.members(model))
        if members in ensembles:
            refuse("grid.models", model, f"'{ensembles[members]}' and '{model}' are the same ensemble. Name it once.")
        ensembles[members] = model
        for name in members - set(grid.backbones):
            refuse(
                "grid.models", model,
                f"backbone '{name}' of '{model}' is not in grid.backbones ({', '.join(grid.backbones)}), so nothing "
                "would extract its features. Add it there.", grid.backbones,
            )  # fmt: skip
    for model in grid.finetune:
        if model not in grid.models:
            refuse(
                "grid.finetune", model,
                f"'{model}' is not in grid.models ({', '.join(grid.models)}). Fine-tuning starts from the frozen "
                "model's head: add it there.", grid.models,
            )  # fmt: skip
    for name in params.composition.backbones:
        params.backbone(name)
        if name not in grid.backbones:
            refuse(
                "composition.backbones", name,
                f"'{name}' is not in grid.backbones ({', '.join(grid.backbones)}), so nothing would extract its "
                "features. Add it there.", grid.backbones,
            )  # fmt: skip

    for name in params.distill.datasets:
        params.dataset(name)
    teacher = params.distill.teacher
    if teacher != "best" and teacher not in grid.models:
        refuse(
            "distill.teacher", teacher,
            f"'{teacher}' is not in grid.models ({', '.join(grid.models)}), so it has no trained head. Add it there, "
            "or use best.", ("best", *grid.models),
        )  # fmt: skip
    for name in grid.students:
        weights, key = params.student(name).weights, f"students.{name}.weights"
        if weights == "random":
            continue
        if weights not in grid.backbones:
            refuse(
                key, weights,
                f"'{weights}' is neither random nor a backbone of the grid ({', '.join(grid.backbones)}), so its "
                "weights would not be fetched.", ("random", *grid.backbones),
            )  # fmt: skip
        if params.backbone(weights).weights != "pretrained":
            refuse(key, weights, f"the backbone '{weights}' has no trained weights. Use random.", ("random",))


def _refuse_renamed(raw: object, path: Path | str) -> None:
    """Refuse keys and values of earlier versions.

    Raises:
        UserError: the new name.
    """
    for old, new in RENAMED_KEYS.items():
        for key, value in _matches(raw, old.split(".")):
            new_key = _fill(new, key)
            raise UserError(
                f"{path}: {key} is now called {new_key}. Rename it.",
                key=key,
                value=value,
                allowed=[new_key],
                path=path,
            )
    for (pattern, old), new in RENAMED_VALUES.items():
        for key, value in _matches(raw, pattern.split(".")):
            if value == old:
                raise UserError(
                    f"{path}: {key} is {old!r}, which is now called {new!r}. Rename it.",
                    key=key,
                    value=value,
                    allowed=[new],
                    path=path,
                )


def _matches(raw: object, pattern: list[str], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield the dotted key and value of everything that a pattern such as `backbones.*.weights` matches."""
    if not pattern:
        yield prefix, raw
    elif isinstance(raw, Mapping):
        for key in raw if pattern[0] == "*" else [pattern[0]] if pattern[0] in raw else []:
            yield from _matches(raw[key], pattern[1:], f"{prefix}.{key}" if prefix else str(key))


def _fill(pattern: str, key: str) -> str:
    """Replace the `*` of a pattern by the name at that position of a key."""
    parts = key.split(".")
    return ".".join(parts[i] if part == "*" else part for i, part in enumerate(pattern.split(".")))
