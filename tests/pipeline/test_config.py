"""params.yaml: values that are read, and mistakes that are refused with the fields of the error."""

import copy
import dataclasses
import json
import typing

import pytest
import yaml

from pipeline import config, errors
from pipeline.bands import Band
from pipeline.config import FineTuneConfig, StudentConfig
from pipeline.data.augmentation import VIEWS
from pipeline.data.sources import validate
from pipeline.errors import RENAMED_KEYS, UserError
from pipeline.tasks import TaskType
from tests.conftest import ROOT
from tests.errors import raises
from tests.stages.conftest import merge

COMMITTED = yaml.safe_load((ROOT / "params.yaml").read_text())


@pytest.fixture
def load_changed(tmp_path):
    """A function that loads the committed params.yaml with changes, given as nested keys or as a function."""

    def load(change):
        content = copy.deepcopy(COMMITTED)
        if callable(change):
            change(content)
        else:
            content = merge(content, change)
        path = tmp_path / "params.yaml"
        path.write_text(json.dumps(content))
        return config.load(path)

    return load


def nested(key: str, value: object) -> dict:
    """Return {"a": {"b": value}} for the key a.b."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def field_names(model: type) -> list[str]:
    return [field.name for field in dataclasses.fields(model)]


def test_load_exponent_without_point_is_a_number(load_changed):
    params = load_changed(nested("search.learning_rate", ["1e-4", 1]))
    assert params.search.learning_rate == (1e-4, 1.0)
    assert all(type(bound) is float for bound in params.search.learning_rate)


def test_composition_backbones_random_controls_only_if_named(params):
    with_control = dataclasses.replace(params.grid, backbones=(*params.grid.backbones, "lite0_random"))
    params = dataclasses.replace(params, grid=with_control)
    assert params.composition_backbones() == ["raw", "lite0", "lite2"]
    named = dataclasses.replace(params.composition, backbones=("lite0", "lite0_random"))
    assert dataclasses.replace(params, composition=named).composition_backbones() == ["lite0", "lite0_random"]


def test_variants_always_include_supervised(params):
    ablated = dataclasses.replace(params.distill, extra_variants=("logits", "features"))
    assert ablated.variants == ["distilled", "features", "logits", "supervised"]


@pytest.mark.parametrize(("method", "n_last_blocks"), [("all", 0), ("lora", 0), ("last1", 1), ("last12", 12)])
def test_finetune_method_gives_blocks_and_protocol(method, n_last_blocks):
    settings = FineTuneConfig(method)
    name = f"last {n_last_blocks} blocks" if n_last_blocks else method
    assert (settings.n_last_blocks, settings.protocol) == (n_last_blocks, f"fine-tuned ({name})")


def test_head_settings_include_custom_heads(load_changed):
    params = load_changed({"heads": {"segmentation": "mlp", "custom": {"mlp": {"steps": 5, "batch": 2}}}})
    assert params.heads.settings("upernet") is params.heads.upernet
    assert params.heads.settings("mlp").steps == 5
    with raises(UserError, "mlp", key="heads.custom.unet", allowed=("linear", "upernet", "fcn", "mlp")):
        params.heads.settings("unet")


@pytest.mark.parametrize("name", ["upernet", "linear", "a.b"])
def test_load_custom_head_with_a_name_that_is_taken_or_invalid_is_refused(load_changed, name):
    with raises(UserError, name):
        load_changed({"heads": {"custom": {name: {"steps": 1, "batch": 1}}}})


def test_literals_equal_the_tables_of_upper_layers():
    assert typing.get_args(config.ViewName) == tuple(VIEWS)
    assert typing.get_args(config.TaskName) == tuple(TaskType)


INVALID = {
    "train.seeds": ["ten", True, 0],
    "extract.compiled": ["no"],
    "weights_dir": [3],
    "search.learning_rate": [[1, 0.1]],
    "search.weight_decay": [[0.1, 1, 2]],
    "extract.codec": ["gzip"],
    "extract.views": [["flip_x"], ["identity", "identity"]],
    "compute.workers": [-1],
    "compute.device": ["tpu"],
    "backbones.lite0.input_units": ["dn"],
    "datasets.sample-landuse.block": [250],
    "heads.max_feature_gb": [float("inf"), float("nan")],
    "heads.levels": [3],
    "heads.upernet.batch": [1],
    "grid.models": [[], ["raw", "raw"]],
    "distill.temperature": [0.0],
    "distill.loss_weights.labels": [0.0],
    "finetune.method": ["last0"],
    "finetune.layer_decay": [1.5],
}
ALLOWED = {
    "compute.device": ("auto", "cpu", "cuda"),
    "backbones.lite0.input_units": ("reflectance", "display", "any"),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in INVALID.items() for value in values])
def test_load_invalid_value_is_refused(load_changed, tmp_path, key, value):
    with raises(UserError, key, repr(value), *ALLOWED.get(key, ()), key=key, path=tmp_path / "params.yaml") as info:
        load_changed(nested(key, value))
    assert info.value.value == value or value != value
    assert info.value.allowed == ALLOWED.get(key)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("key", "values", "invalid"),
    [
        ("extract.views", ["identity", "flip"], "flip"),
        ("search.learning_rate", [0.1, float("inf")], float("inf")),
        ("search.learning_rate", [0.1, True], True),
        ("finetune.learning_rates", [1e-3, 0], 0),
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
def test_load_invalid_name_is_refused(load_changed, section):
    entry = next(iter(COMMITTED[section].values()))
    for name in ("a b; ls", "a+b", "a.b", "-a", ""):
        with raises(UserError, repr(name), value=name):
            load_changed({section: {name: entry}})


@pytest.mark.parametrize(
    ("change", "key", "allowed"),
    [
        ({"train": {"sedes": 3}}, "train.sedes", ("seeds",)),
        ({"finetune": {"epochs": 3}}, "finetune.epochs", field_names(FineTuneConfig)),
        ({"students": {"small": {"width": 2}}}, "students.small.width", field_names(StudentConfig)),
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


def test_load_section_that_is_not_a_mapping_is_refused(load_changed):
    for value in ([1], None):
        with raises(UserError, *field_names(config.GridConfig), key="grid", value=value):
            load_changed({"grid": value})


def test_load_several_mistakes_are_reported_together(load_changed):
    with raises(UserError, "sedes", "extract.precision", "compute.device", "1 more") as info:
        compute = {"device": "tpu", "workers": -1}
        load_changed({"train": {"sedes": 3}, "extract": {"precision": "fp8"}, "compute": compute})
    assert info.value.key == "extract.precision"


def test_load_absent_or_invalid_file_is_refused(tmp_path):
    path, text = tmp_path / "params.yaml", (ROOT / "params.yaml").read_text()
    contains_itself = text.replace("datasets:", "extra: &a [*a]\ndatasets:", 1)
    for content in (None, "grid: [", "", contains_itself):
        if content is not None:
            path.write_text(content)
        with raises(UserError, path, path=path, value=None):
            config.load(path)


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
        (lambda c: c["grid"]["finetune"].append("raw+lite0"), "grid.finetune", "raw+lite0"),
        (lambda c: c["composition"].update(backbones=["lite1"]), "backbones", "lite1"),
        (lambda c: c["composition"].update(backbones=["dofa_300m"]), "composition.backbones", "dofa_300m"),
        (lambda c: c["distill"].update(datasets=["sample-tree"]), "datasets", "sample-tree"),
        (lambda c: c["distill"].update(teacher="hiera_200m"), "distill.teacher", "hiera_200m"),
        (lambda c: c["students"]["small"].update(weights="lite0_random"), "students.small.weights", "lite0_random"),
    ],
)
def test_load_reference_to_something_absent_is_refused(load_changed, change, key, value):
    with raises(UserError, value, key=key, value=value) as info:
        load_changed(change)
    assert "same ensemble" in str(info.value) or "twice" in str(info.value) or info.value.allowed


def test_load_renamed_key_is_refused_with_its_new_name(load_changed, params):
    dataset = dataclasses.replace(params.dataset("m-eurosat"), options={"set": "m-eurosat", "as_labelled": True})
    for old, new in RENAMED_KEYS.items():
        name = {"backbones": "lite0", "datasets": "geobench"}.get(old.partition(".")[0], "")
        old, new = old.replace("*", name), new.replace("*", name)
        with raises(UserError, old, new, key=old, allowed=[new]):
            validate(name, dataset) if ".options." in old else load_changed(nested(old, 1))


@pytest.mark.parametrize(("old", "new"), config.RENAMED_VALUES.items())
def test_load_renamed_value_is_refused_with_its_new_name(load_changed, old, new):
    keys = {"raw": "backbones.lite0.family", "unit": "backbones.lite0.input_units"}
    key = keys.get(old, "datasets.sample-trees.source")
    with raises(UserError, key, new, key=key, value=old, allowed=[new]):
        load_changed(nested(key, old))


def test_renamed_keys_lead_to_keys_that_exist():
    schema = json.loads(config.json_schema())
    for new in RENAMED_KEYS.values():
        *parents, name = new.replace("*", "x").split(".")
        parents = parents[:2] if "options" in parents else parents
        assert ("options" if "options" in new else name) in errors.subschema(schema, parents)["properties"], new


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
