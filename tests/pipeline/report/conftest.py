"""Made-up models of known accuracy, and a folder of their results in the formats of the stages."""

import itertools
import json
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import rasterio

from pipeline import config
from pipeline.composition import CompositionResult
from pipeline.report import significance
from pipeline.report.significance import bootstrap, summarize_runs
from pipeline.tasks import Classification, Segmentation
from pipeline.training import predictions
from stages import report

TASK = Classification(2)
SAMPLES, SEEDS = [f"s{i:03d}" for i in range(300)], 3
LABEL = np.random.default_rng(0).integers(2, size=len(SAMPLES))
FINE_TUNED = {"protocol": "fine-tuned (lora)", "frozen_val_score": 0.6, "best_step": 40, "trained_parameters": 1234}


class Model(NamedTuple):
    """Weights and true accuracy of a model, its result folder, and further columns of its runs."""

    weights: str
    accuracy: float
    folder: str
    columns: dict


HEAD = {"head": "linear, film, mean_level0"}
MODELS = {
    "a": Model("pretrained", 0.9, "runs/d/a", HEAD),
    "b": Model("pretrained", 0.6, "runs/d/b", {}),
    "a_random": Model("random, seed 0", 0.5, "runs/d/a_random", {}),
    "a+b": Model("p+p", 0.9, "runs/d/a+b", HEAD),
    "a+c": Model("p+p", 0.9, "train_selected/d/a+c", {}),
    "b, fine-tuned": Model("pretrained", 1.0, "finetune/d/b", FINE_TUNED),
    "small (distilled)": Model("random", 0.85, "distill/d/small/distilled", {"protocol": "distilled"}),
    "small (supervised)": Model("random", 0.7, "distill/d/small/supervised", {"protocol": "supervised"}),
}


@pytest.fixture(scope="session", autouse=True)
def fewer_draws():
    """A tenth of the bootstrap draws."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(significance, "N_DRAWS", 1000)
        yield


def predict(model: str) -> np.ndarray:
    """Predictions (seed, sample) of a model, each right with the probability of its accuracy."""
    draws = np.random.default_rng(sum(map(ord, model))).random((SEEDS, len(SAMPLES)))
    return np.where(draws > MODELS[model].accuracy, 1 - LABEL, LABEL)


def make_runs(dataset, model, weights, scores, **columns) -> pd.DataFrame:
    """Runs of a model, one per score."""
    columns = {"protocol": "frozen", "task": "classification", "metric": "accuracy", "n_test": len(SAMPLES),
               "classes": 2, "seed": range(len(scores)), "learning_rate": 0.1, "weight_decay": 0.1,
               "val_score": scores} | columns  # fmt: skip
    return pd.DataFrame({"dataset": dataset, "model": model, "weights": weights, "score": scores} | columns)


@pytest.fixture(scope="session")
def grid():
    """Runs and draws of the models on dataset d."""
    runs, draws = [], {}
    for name, model in MODELS.items():
        counts = np.stack([TASK.counts(predicted, LABEL) for predicted in predict(name)])
        draws["d", name] = bootstrap(TASK, counts, stream=len(draws))
        runs.append(make_runs("d", name, model.weights, TASK.score(counts.sum(1)), **model.columns))
    return pd.concat(runs, ignore_index=True), draws


@pytest.fixture(scope="session")
def summary(grid):
    """Summary of the grid without the student."""
    return summarize_runs(*grid)[:6]


@pytest.fixture(scope="session")
def compositions():
    """Results of the composition search on two datasets, of which e has no backbones to combine."""
    pairs = itertools.product(["level0", "all"], "abc", "abc")
    cka = pd.DataFrame(pairs, columns=["level", "backbone_a", "backbone_b"])
    cka["cka"] = np.where(cka.backbone_a == cka.backbone_b, 1, 0.25)
    subsets = pd.DataFrame(
        {"model": ["b+a", "a+c", "a", "b"], "members": [2, 2, 1, 1], "channels": [9, 7, 4, 5],
         "score": [0.9, 0.85, 0.8, 0.7], "gain": [0.1, 0.05, np.nan, np.nan], "cka": [0.25, 0.25, np.nan, np.nan]}
    )  # fmt: skip
    greedy = pd.DataFrame({"backbone": ["a"], "layer": ["level0"], "score": [0.8]})
    result = CompositionResult(("a", "b", "c"), (), "logistic", subsets, cka, greedy, ("b+a", "a+c"))
    return {"d": result, "e": CompositionResult(skipped=("a needs <nir>.",))}


@pytest.fixture(scope="session")
def results(grid, compositions, tmp_path_factory):
    """Folder of the results of a grid and their report; on e, for segmentation, only a is trained."""
    folder = tmp_path_factory.mktemp("report") / "results"
    for dataset, result in compositions.items():
        (folder / "compose" / dataset).mkdir(parents=True)
        result.write(folder / "compose" / dataset)
    runs, _ = grid
    for name, model in MODELS.items():
        table = predictions.prediction_table(SAMPLES, LABEL, np.eye(2)[predict(name)], TASK)
        write_runs(folder / model.folder, runs[runs.model == name].drop(columns="model"), table)
    masks = LABEL.reshape(3, 10, 10)
    table = predictions.confusion_table(SAMPLES[:3], Segmentation(2).counts(1 - masks, masks)[None])
    runs = make_runs("e", "a", "pretrained", [0.25], task="segmentation", metric="mean IoU", n_test=3)
    write_runs(folder / "runs/e/a", runs, table)
    models = ["a", "b", "a_random", "a+b"]
    for model in models:
        write_json(folder / f"tune/d/{model}.json", {"skipped": None, "classes": ["no", "yes"]})
        write_json(folder / f"tune/e/{model}.json", {"skipped": None if model == "a" else "b needs <nir>."})
    write_student_records(folder)
    for dataset, score_range in (("d", [0.25, 0.75]), ("e", None)):
        write_json(folder.parent / f"data/raw/{dataset}/source.json", {"score_range": score_range})
    grid_config = SimpleNamespace(datasets=["d", "e"], models=models, finetune=["b"], students=["small"])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder.parent)
        patch.setattr(config, "load", lambda: SimpleNamespace(grid=grid_config))
        report.make_report()
    return folder


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_runs(folder, runs, table):
    folder.mkdir(parents=True)
    runs.to_csv(folder / "runs.csv", index=False)
    table.to_parquet(folder / "predictions.parquet")


def write_student_records(folder):
    """Write the costs, and all records of the student, which is skipped on e."""
    costs = pd.DataFrame(
        {"dataset": "d", "model": ["a+b", "a", "b", "small"], "parameters": [2e7, 1e7, 1e7, 1e6],
         "bytes": [8e7, 4e7, 4e7, 4e6], "flops": [4e9, 2e9, 2e9, 1e8], "device": "cpu", "cores": 2,
         "chips_per_second": [10.0, 20.0, 20.0, 100.0]}
    )  # fmt: skip
    gpu = costs.assign(device="cuda", chips_per_second=[1000.0, 2000.0, 2000.0, 7777.0])
    (folder / "cost").mkdir()
    pd.concat([costs, gpu]).to_csv(folder / "cost/d.csv", index=False)
    (folder / "cost/e.csv").write_text("dataset,model\n")
    file = {"bytes": 3_800_000, "score": 0.5, "difference": 4e-6, "images_per_second": 75.5}
    records = {
        "distill/{}/small/metadata.json": {"teacher": "a+b", "weights": "random",
                                           "variants": {"distilled": {}, "supervised": {}}},
        "export/{}/small/export.json": {"files": {"student.onnx": file, "student.pt2": file}, "metric": "accuracy",
                                        "chips": 18},
        "map/{}/small/map.json": {"task": "classification", "classes": ["water", "land"]},
    }  # fmt: skip
    for path, record in records.items():
        write_json(folder / path.format("d"), {"skipped": None, **record})
        write_json(folder / path.format("e"), {"skipped": "no teacher"})
    classes = np.full((1, 40, 3000), 255, np.uint8)
    classes[..., :1000], classes[..., 1000:2000] = 0, 1
    profile = {"height": 40, "width": 3000, "count": 1, "dtype": "uint8", "transform": rasterio.Affine.scale(9, -9)}
    for name in ("class", "confidence"):
        with rasterio.open(folder / f"map/d/small/{name}.tif", "w", **profile) as dataset:
            dataset.write(np.minimum(classes, 100) if name == "confidence" else classes)
