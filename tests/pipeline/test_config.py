import pytest
import yaml

from pipeline import config
from pipeline.errors import UserError
from tests.conftest import ROOT


def load_with(tmp_path, change):
    content = yaml.safe_load((ROOT / "params.yaml").read_text())
    change(content)
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(content))
    return config.load(path)


def test_the_committed_file_is_valid(params):
    assert params.members("csmask_b4+lite0") == ["csmask_b4", "lite0"]
    assert params.search.trials == 16
    assert params.train.seeds == 10


def test_numbers_in_either_yaml_dialect(tmp_path):
    changed = load_with(tmp_path, lambda c: c["search"].update(learning_rate=["1e-4", 1]))
    assert changed.search.learning_rate == (1e-4, 1.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["train"].update(sedes=3), ["params.yaml: train", "sedes", "Known keys: seeds"]),
        (lambda c: c.update(trian={}), ["trian", "Known keys: grid"]),
        (
            lambda c: c["backbones"]["lite0"].update(inputsize=3),
            ["backbones: lite0", "inputsize", "input_size"],
        ),
        (lambda c: c["train"].pop("seeds"), ["lacks: seeds"]),
        (lambda c: c["train"].update(seeds="ten"), ["must be int", "'ten'"]),
        (lambda c: c["train"].update(seeds=0), ["train.seeds is 0"]),
        (lambda c: c["grid"]["datasets"].append("m-eurosta"), ["m-eurosta", "sample-landuse"]),
        (lambda c: c["grid"]["models"].append("lite0+hiera"), ["hiera", "csmask_b4"]),
        (lambda c: c["grid"]["models"].append("lite0+lite0"), ["twice"]),
        (lambda c: c["grid"]["backbones"].remove("lite0"), ["lite0", "grid.backbones", "Add it there"]),
        (lambda c: c["backbones"]["lite0"].update(input_size=0), ["input_size is 0", "at least 1"]),
        (
            lambda c: c["backbones"]["lite0"].update(normalisation="own"),
            ["normalisation is 'own'", "native, dataset"],
        ),
        (lambda c: c["backbones"]["lite0"].update(hub={"repo": "a/b"}), ["lite0: hub lacks: file, revision"]),
        (lambda c: c["extract"].update(precision="fp8"), ["extract.precision is 'fp8'", "bfloat16"]),
        (lambda c: c["compute"].update(workers=-1), ["compute.workers is -1"]),
        (lambda c: c["datasets"]["sample-landuse"].update(chip=24), ["multiple of the chip"]),
        (lambda c: c["datasets"]["sample-landuse"]["splits"].update(test=0.5), ["sum to 1"]),
        (lambda c: c["datasets"]["sample-landuse"].update(task="regression"), ["regression", "segmentation"]),
        (lambda c: c["compute"].update(device="tpu"), ["tpu", "cuda"]),
        (lambda c: c["search"].update(learning_rate=[1, 0.1]), ["low <= high"]),
        (lambda c: c["search"].update(learning_rate=[0.1, float("inf")]), ["learning_rate is [0.1, inf]"]),
        (lambda c: c["datasets"].update({"a b; ls": c["datasets"]["sample-trees"]}), ["'a b; ls' is no name"]),
        (lambda c: c["backbones"].update({"a+b": c["backbones"]["raw"]}), ["'a+b' is no name"]),
        (lambda c: c["datasets"].update({"a.b": c["datasets"]["sample-trees"]}), ["'a.b' is no name"]),
        (lambda c: c["grid"]["models"].append("lite0+csmask_b4"), ["lite0+csmask_b4", "same ensemble"]),
        (lambda c: c["grid"].update(models=[]), ["grid.models", "at least one"]),
        (lambda c: c["grid"]["models"].append("raw"), ["each once"]),
        (lambda c: c["datasets"]["sample-trees"].update(seed=-1), ["must not be negative"]),
        (lambda c: c["heads"]["upernet"].update(batch=1), ["at least 2", "BatchNorm"]),
        (lambda c: c["heads"].update(segmentation="unet"), ["heads.segmentation is 'unet'", "upernet, fcn"]),
        (lambda c: c["heads"].update(fusion="sum"), ["heads.fusion is 'sum'", "concat, average, film, dot"]),
        (lambda c: c["heads"].update(class_weights="rare"), ["heads.class_weights is 'rare'", "none, balanced"]),
        (lambda c: c["heads"].update(precision="float16"), ["heads.precision is 'float16'", "bfloat16"]),
        (lambda c: c["heads"].update(memory=-1), ["heads.memory is -1", "0 streams every set"]),
        (lambda c: c["heads"].update(checks=0), ["heads.checks is 0"]),
        (lambda c: c["heads"]["fcn"].update(steps=0), ["heads.fcn.steps is 0"]),
        (lambda c: c["heads"]["linear"].update(patience=-1), ["heads.linear.patience is -1", "all steps"]),
        (lambda c: c.update(grid=[1]), ["must be a mapping"]),
        (lambda c: c["compose"].update(backbones=["lite1"]), ["no backbone 'lite1'"]),
        (lambda c: c["compose"].update(backbones=["dofa_300m"]), ["dofa_300m", "grid.backbones", "Add it there"]),
        (lambda c: c["compose"].update(backbones=["raw", "raw"]), ["compose.backbones", "each once"]),
        (lambda c: c["compose"].update(probe="svm"), ["compose.probe is 'svm'", "logistic, knn"]),
        (lambda c: c["compose"].update(best=-1), ["compose.best is -1"]),
    ],
)
def test_a_mistake_names_what_was_given_and_what_exists(tmp_path, change, words):
    with pytest.raises(UserError) as error:
        load_with(tmp_path, change)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


def test_no_file_and_no_yaml(tmp_path):
    with pytest.raises(UserError, match="Run from the root"):
        config.load(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("grid: [")
    with pytest.raises(UserError, match="not valid YAML"):
        config.load(tmp_path / "params.yaml")


def test_random_controls_are_composed_only_if_named(params, tmp_path):
    assert params.composed() == ["raw", "csmask_b4", "lite0"]
    changed = load_with(tmp_path, lambda c: c["compose"].update(backbones=["lite0", "lite0_random"]))
    assert changed.composition_backbones() == ["lite0", "lite0_random"]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("codec", "gzip", "extract.codec: there is no codec 'gzip'; there are none, lz4"),
        ("codec", "bitround11", "float16 has 10"),
        ("views", ["flip_x"], r"extract.views is \['flip_x'\]; it must begin with identity"),
        ("views", ["identity", "flip"], "extract.views is 'flip'; it must be one of: identity, flip_x"),
        ("views", ["identity", "identity"], "name each view once"),
    ],
)
def test_codecs_and_views(tmp_path, key, value, said):
    with pytest.raises(UserError, match=said):
        load_with(tmp_path, lambda content: content["extract"].update({key: value}))
