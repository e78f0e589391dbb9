"""Configuration of a head, from which it is created and restored from its checkpoint."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial

from cache.schema import layer_name
from pipeline.config import CustomHeadConfig, HeadSettings
from pipeline.heads import get_head
from pipeline.heads.dense import HeadList
from pipeline.heads.fusion import FusedHead, PyramidFusion, get_fusion
from pipeline.heads.linear import StackedLinear

# K heads that are trained together; `pipeline.heads` documents the interface.
HeadGroup = StackedLinear | HeadList
# Fields of a dense head's settings that its class does not take.
TRAINING_FIELDS = {"steps", "batch", "patience", "neck"}


@dataclass(frozen=True)
class HeadConfig:
    """A head on a model's features.

    Attributes:
        head: `linear`, or a name of `pipeline.heads.HEADS`.
        fusion: a name of `pipeline.heads.fusion.FUSIONS`.
        shapes: shapes of each backbone's arrays, (channel,) or (channel, y, x).
        output_size: (y, x) of the masks; empty for pooled features.
        options: further arguments of the head's class.
        neck: whether a transformer's levels are first resampled to a pyramid.
        precision: of dense heads, float32 or bfloat16.
    """

    head: str
    fusion: str
    shapes: tuple[tuple[tuple[int, ...], ...], ...]
    n_classes: int
    output_size: tuple[int, ...] = ()
    options: dict[str, object] = field(default_factory=dict)
    neck: bool = False
    precision: str = "float32"

    def create_group(self, seeds: Sequence[int]) -> HeadGroup:
        """Create untrained heads, one per seed; an unknown head or fusion raises UserError."""
        if self.head != "linear":
            return HeadList(self._create_dense, self.output_size, seeds, self.precision)
        widths, fusion = [sum(shape[0] for shape in member) for member in self.shapes], get_fusion(self.fusion)
        is_concatenated = self.fusion == "concat" or len(widths) == 1
        return StackedLinear(widths, self.n_classes, seeds, None if is_concatenated else fusion)

    def _create_dense(self) -> FusedHead:
        create = partial(get_head(self.head), n_classes=self.n_classes, **self.options)
        return FusedHead(PyramidFusion(self.shapes, self.fusion, self.neck), create)


def head_options(settings: HeadSettings) -> dict[str, object]:
    """Return the arguments of a dense head's class, from its settings in params.yaml."""
    if isinstance(settings, CustomHeadConfig):
        return dict(settings.options)
    return {name: value for name, value in asdict(settings).items() if name not in TRAINING_FIELDS}


def describe_head(config: HeadConfig, array_names: Sequence[Sequence[str]], has_class_weights: bool) -> str:
    """Describe a head and its inputs, such as "upernet of 16 channels, concat, level0"."""
    arrays = [layer_name(name) for names in array_names for name in names]
    options = dict(config.options)
    channels = options.pop("channels", None)
    parts = [
        f"{config.head} of {channels} channels" if channels else config.head,
        *(f"{name} {value}" for name, value in options.items()),
        config.fusion if len(array_names) > 1 else "",
        *dict.fromkeys(arrays),
        "balanced class weights" if has_class_weights else "",
    ]
    return ", ".join(filter(None, parts))
