"""params.yaml: values that are read, and mistakes that are refused with the fields of the error."""

import dataclasses
import json
import typing

import pytest
import yaml

from pipeline import config, errors
from pipeline.bands import Band
from pipeline.config import FineTuneConfig, HubFile, StudentConfig
from pipeline.data.augmentation import VIEWS
from pipeline.data.sources import validate
from pipeline.errors import RENAMED_KEYS, UserError
from pipeline.tasks import TaskType
from tests.conftest import ROOT
from tests.errors import raises


def merge(base: dict, change: dict) -> dict:
    """Return `base` with the keys of `change` set, at any depth."""
    return {
        **base,
        **{
            key: merge(base.get(key) or {}, value) if isinstance(value, dict) else value
            for key, value in change.items()
        },
    }


@pytest.fixture
def load_changed(tmp_path):
    """A function that loads the committed params.yaml with changes, given as nested keys or as a function."""

    def load(change):
        content = yaml.safe_load((ROOT / "params.yaml").read_text())
        if callable(change):
            change(content)
        else:
            content = merge(content, change)
        path = tmp_path / "params.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return config.load(path)

    return load


def nested(key: str, value: object) -> dict:
    """Return {"a": {"b": value}} for the key a.b."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def field_names(model: type) -> list[str]:
    return [field.name for field in dataclasses.fields(model)]


# Values


def test_load_committed_file_is_valid(params):
    assert params.members("csmask_b4+lite0") == ["csmask_b4", "lite0"]
    assert params.search.trials == 16
    assert params.train.seeds == 10
    assert params.grid.finetune == ()
    assert params.finetune.protocol == "fine-tuned (all)"


def test_load_exponent_without_point_is_a_number(load_changed):
    params = load_changed(nested("search.learning_rate", ["1e-4", 1]))
    assert params.search.learning_rate == (1e-4, 1.0)
    assert all(type(bound) is float for bound in params.search.learning_rate)


def test_load_sections_are_read_only(params):
    with pytest.raises(TypeError):
        params.datasets["x"] = params.dataset("sample-trees")
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.train.seeds = 3


def test_composition_backbones_random_controls_only_if_named(params):
    with_control = dataclasses.replace(params.grid, backbones=(*params.grid.backbones, "lite0_random"))
    params = dataclasses.replace(params, grid=with_control)
    assert params.composition_backbones() == ["raw", "lite0", "lite2"]
    named = dataclasses.replace(params.composition, backbones=("lite0", "lite0_random"))
    assert dataclasses.replace(params, composition=named).composition_backbones() == ["lite0", "lite0_random"]


def test_variants_always_include_supervised(params):
    assert params.distill.variants == ["distilled", "supervised"]
    ablated = dataclasses.replace(params.distill, extra_variants=("logits", "features"))
    assert ablated.variants == ["distilled", "features", "logits", "supervised"]


@pytest.mark.parametrize(
    ("method", "n_last_blocks", "protocol"),
    [
        ("lora", 0, "fine-tuned (lora)"),
        ("last1", 1, "fine-tuned (last 1 blocks)"),
        ("last12", 12, "fine-tuned (last 12 blocks)"),
    ],
)
def test_finetune_method_gives_blocks_and_protocol(method, n_last_blocks, protocol):
    settings = FineTuneConfig(method)
    assert (settings.n_last_blocks, settings.protocol) == (n_last_blocks, protocol)


def test_head_settings_include_custom_heads(load_changed):
    params = load_changed({"heads": {"segmentation": "mlp", "custom": {"mlp": {"steps": 5, "batch": 2}}}})
    assert params.heads.settings("upernet") is params.heads.upernet
    assert params.heads.settings("mlp").steps == 5
    with raises(UserError, "mlp", key="heads.custom.unet", allowed=("linear", "upernet", "fcn", "mlp")):
        params.heads.settings("unet")


# Literals of the schema that equal tables of upper layers


@pytest.mark.parametrize("name", ["upernet", "linear", "a.b"])
def test_load_custom_head_with_a_name_that_is_taken_or_invalid_is_refused(load_changed, name):
    with raises(UserError, name):
        load_changed({"heads": {"custom": {name: {"steps": 1, "batch": 1}}}})


def test_load_list_that_contains_itself_is_refused(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text((ROOT / "params.yaml").read_text().replace("datasets:", "extra: &a [*a]\ndatasets:", 1))
    with raises(UserError, path=path):
        config.load(path)


def test_literals_equal_the_tables_of_upper_layers():
    assert typing.get_args(config.ViewName) == tuple(VIEWS)
    assert typing.get_args(config.TaskName) == tuple(TaskType)


# Mistakes in one value: (key, value, allowed values or None)

VALUES = [
    ("train.seeds", "ten", None),
    ("train.seeds", True, None),
    ("train.seeds", 1.0, None),
    ("train.seeds", 0, None),
    ("extract.compiled", "no", None),
    ("weights_dir", 3, None),
    ("search.learning_rate", True, None),
    ("search.learning_rate", [1, 0.1], None),
    ("search.learning_rate", [0.1], None),
    ("search.weight_decay", [0.1, 1, 2], None),
    ("extract.precision", "fp8", ("float32", "bfloat16", "float16")),
    ("extract.dtype", "float64", ("float16", "float32")),
    ("extract.codec", "gzip", None),
    ("extract.codec", "bitround11", None),
    ("extract.views", ["flip_x"], None),
    ("extract.views", ["identity", "identity"], None),
    ("compute.workers", -1, None),
    ("compute.device", "tpu", ("auto", "cpu", "cuda")),
    ("backbones.lite0.weights", "trained", ("pretrained", "random", "none")),
    ("backbones.lite0.normalisation", "own", ("native", "dataset")),
    ("backbones.lite0.input_units", "dn", ("reflectance", "display", "any")),
    ("datasets.sample-landuse.task", "regression", ("classification", "multilabel", "segmentation")),
    ("datasets.sample-landuse.block", 250, None),
    ("heads.class_weights", "rare", ("none", "balanced")),
    ("heads.precision", "float16", ("auto", "float32", "bfloat16")),
    ("heads.max_feature_gb", -1, None),
    ("heads.max_feature_gb", float("inf"), None),
    ("heads.max_feature_gb", float("nan"), None),
    ("heads.levels", 3, None),
    ("heads.upernet.batch", 1, None),
    ("heads.linear.pooled", "first", ("last", "all")),
    ("heads.linear.tokens", "max", ("mean", "cls", "both")),
    ("composition.probe", "svm", ("logistic", "knn")),
    ("composition.backbones", ["raw", "raw"], None),
    ("grid.models", [], None),
    ("grid.models", ["raw", "raw"], None),
    ("distill.temperature", 0.0, None),
    ("distill.loss_weights.labels", 0.0, None),
    ("finetune.method", "last0", None),
    ("finetune.learning_rates", [], None),
    ("finetune.layer_decay", 1.5, None),
    ("finetune.layer_decay", 0, None),
]


@pytest.mark.parametrize(("key", "value", "allowed"), VALUES)
def test_load_invalid_value_is_refused(load_changed, tmp_path, key, value, allowed):
    with raises(UserError, key, repr(value), key=key, path=tmp_path / "params.yaml") as info:
        load_changed(nested(key, value))
    assert info.value.value == value or value != value
    assert info.value.allowed == allowed
    assert all(name in str(info.value) for name in allowed or ())
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("key", "values", "invalid"),
    [
        ("extract.views", ["identity", "flip"], "flip"),
        ("search.learning_rate", [0.1, float("inf")], float("inf")),
        ("search.learning_rate", [0.1, True], True),
        ("finetune.learning_rates", [1e-3, 0], 0),
        ("distill.extra_variants", ["both"], "both"),
        ("grid.models", ["raw", 3], 3),
        ("finetune.learning_rates", [1e-3, "1e-3"], [1e-3, "1e-3"]),
    ],
)
def test_load_invalid_item_of_a_list_is_refused(load_changed, key, values, invalid):
    with raises(UserError, repr(invalid), key=key, value=invalid):
        load_changed(nested(key, values))


def test_load_splits_that_do_not_sum_to_one_are_refused(load_changed):
    with raises(UserError, 0.5, key="datasets.sample-landuse.splits"):
        load_changed(nested("datasets.sample-landuse.splits.test", 0.5))


@pytest.mark.parametrize("section", ["datasets", "backbones", "students"])
@pytest.mark.parametrize("name", ["a b; ls", "a+b", "a.b", "-a", ""])
def test_load_invalid_name_is_refused(load_changed, section, name):
    def change(content):
        content[section][name] = next(iter(content[section].values()))

    with raises(UserError, repr(name), value=name):
        load_changed(change)


# Unknown and missing keys, and values of the wrong shape


@pytest.mark.parametrize(
    ("change", "key", "allowed"),
    [
        ({"train": {"sedes": 3}}, "train.sedes", ("seeds",)),
        ({"finetune": {"epochs": 3}}, "finetune.epochs", field_names(FineTuneConfig)),
        ({"students": {"small": {"width": 2}}}, "students.small.width", field_names(StudentConfig)),
        (
            {"backbones": {"lite0": {"hub": {"repo": "a/b", "file": "f", "revision": "0", "commit": "0"}}}},
            "backbones.lite0.hub.commit",
            field_names(HubFile),
        ),
        ({"trian": {}}, "trian", field_names(config.Params)),
    ],
)
def test_load_unknown_key_is_refused_with_the_known_ones(load_changed, change, key, allowed):
    with raises(UserError, key.rpartition(".")[2], *allowed, key=key, allowed=allowed):
        load_changed(change)


def test_load_unknown_key_names_the_similar_one(load_changed):
    with raises(UserError, "'input_size'"):
        load_changed({"backbones": {"lite0": {"inputsize": 3}}})


def test_load_missing_key_is_refused(load_changed):
    with raises(UserError, "seeds", key="train.seeds", allowed=("seeds",)):
        load_changed(lambda content: content["train"].pop("seeds"))
    with raises(UserError, "file", "revision", key="backbones.lite0.hub.file"):
        load_changed({"backbones": {"lite0": {"hub": {"repo": "a/b"}}}})


@pytest.mark.parametrize("value", [[1], None, "x"])
def test_load_section_that_is_not_a_mapping_is_refused(load_changed, value):
    with raises(UserError, *field_names(config.GridConfig), key="grid", value=value):
        load_changed({"grid": value})


def test_load_several_mistakes_are_reported_together(load_changed):
    with raises(UserError, "sedes", "extract.precision", "compute.device", "1 more") as info:
        load_changed(
            {"train": {"sedes": 3}, "extract": {"precision": "fp8"}, "compute": {"device": "tpu", "workers": -1}}
        )
    assert info.value.key == "extract.precision"


def test_load_absent_or_invalid_file_is_refused(tmp_path):
    path = tmp_path / "params.yaml"
    with raises(UserError, path, path=path):
        config.load(path)
    path.write_text("grid: [")
    with raises(UserError, path, path=path):
        config.load(path)
    path.write_text("")
    with raises(UserError, path, path=path, value=None):
        config.load(path)


# References between sections


@pytest.mark.parametrize(
    ("change", "key", "value"),
    [
        (lambda c: c["grid"]["datasets"].append("m-eurosta"), "datasets", "m-eurosta"),
        (lambda c: c["grid"]["backbones"].append("hiera"), "backbones", "hiera"),
        (lambda c: c["grid"]["students"].append("tiny"), "students", "tiny"),
        (lambda c: c["grid"]["models"].append("lite0+hiera"), "backbones", "hiera"),
        (lambda c: c["grid"]["models"].append("lite0+lite0"), "grid.models", "lite0+lite0"),
        (lambda c: c["grid"]["models"].append("lite2+lite0"), "grid.models", "lite2+lite0"),
        (lambda c: c["grid"]["backbones"].remove("lite0"), "grid.models", "lite0"),
        (lambda c: c["grid"]["finetune"].append("hiera_200m"), "grid.finetune", "hiera_200m"),
        (lambda c: c["grid"]["finetune"].append("raw+lite0"), "grid.finetune", "raw+lite0"),
        (lambda c: c["composition"].update(backbones=["lite1"]), "backbones", "lite1"),
        (lambda c: c["composition"].update(backbones=["dofa_300m"]), "composition.backbones", "dofa_300m"),
        (lambda c: c["distill"].update(datasets=["sample-tree"]), "datasets", "sample-tree"),
        (lambda c: c["distill"].update(teacher="hiera_200m"), "distill.teacher", "hiera_200m"),
        (lambda c: c["students"]["small"].update(weights="imagenet"), "students.small.weights", "imagenet"),
        (lambda c: c["students"]["small"].update(weights="lite0_random"), "students.small.weights", "lite0_random"),
    ],
)
def test_load_reference_to_something_absent_is_refused(load_changed, change, key, value):
    with raises(UserError, value, key=key, value=value) as info:
        load_changed(change)
    assert "same ensemble" in str(info.value) or "twice" in str(info.value) or info.value.allowed


# Names of earlier versions


@pytest.mark.parametrize(("old", "new"), RENAMED_KEYS.items())
def test_load_renamed_key_is_refused_with_its_new_name(load_changed, params, old, new):
    name = {"backbones": "lite0", "datasets": "geobench"}.get(old.partition(".")[0], "")
    old, new = old.replace("*", name), new.replace("*", name)
    with raises(UserError, old, new, key=old, allowed=[new]):
        if ".options." in old:
            validate(
                name,
                dataclasses.replace(params.dataset("m-eurosat"), options={"set": "m-eurosat", "as_labelled": True}),
            )
        else:
            load_changed(nested(old, {"x": 1} if old == "compose" else 1))


@pytest.mark.parametrize(("old", "new"), config.RENAMED_VALUES.items())
def test_load_renamed_value_is_refused_with_its_new_name(load_changed, old, new):
    key = {"raw": "backbones.lite0.family", "unit": "backbones.lite0.input_units"}.get(
        old, "datasets.sample-trees.source"
    )
    with raises(UserError, key, new, key=key, value=old, allowed=[new]):
        load_changed(nested(key, old))


def test_renamed_keys_lead_to_keys_that_exist():
    schema = json.loads(config.json_schema())
    for new in RENAMED_KEYS.values():
        *parents, name = new.replace("*", "x").split(".")
        parents = parents[:2] if "options" in parents else parents
        assert ("options" if "options" in new else name) in errors.subschema(schema, parents)["properties"], new


# Parsing of other records


@dataclasses.dataclass(frozen=True)
class SceneOptions:
    bands: tuple[Band, ...]
    size: int = 3
    offset: config.Float | None = None


def test_parse_plain_dataclass_is_strict():
    raw = {"bands": [{"name": "B04", "common_name": "red", "wavelength": "6.65e-1", "gsd": 10}]}
    options = config.parse(SceneOptions, raw, "datasets.x.options")
    assert options == SceneOptions((Band("B04", "red", 0.665, 10.0),))
    band = {"name": "B04", "common_name": "red"}
    for change, key, value in (
        ({"bands": [{**band, "gsd": True}]}, "bands[0].gsd", True),
        ({"bands": [{**band, "nam": "B04"}]}, "bands[0].nam", "B04"),
        ({"size": "3"}, "size", "3"),
        ({"offset": "x"}, "offset", "x"),
    ):
        with raises(UserError, key=f"datasets.x.options.{key}", value=value):
            config.parse(SceneOptions, {"bands": []} | change, "datasets.x.options")


def test_parse_date_without_quotes_is_refused(tmp_path):
    raw = yaml.safe_load("bands: []\ntime: 2017-02-16")
    with raises(UserError, "scene.yaml", path="scene.yaml"):
        config.parse(SceneOptions, raw, path="scene.yaml")


# JSON schema


def test_schema_file_is_up_to_date():
    assert (ROOT / config.SCHEMA_FILE).read_text() == config.json_schema(), "run: python -m stages.validate --schema"
    first_line = (ROOT / "params.yaml").read_text().splitlines()[0]
    assert first_line == f"# yaml-language-server: $schema={config.SCHEMA_FILE}"


def test_schema_describes_every_field():
    schema = json.loads(config.json_schema())
    for model in [schema, *schema["$defs"].values()]:
        for name, field in model["properties"].items():
            target = schema["$defs"].get(field.get("$ref", "").rpartition("/")[2], {})
            assert field.get("description") or target.get("description"), (model["title"], name)
