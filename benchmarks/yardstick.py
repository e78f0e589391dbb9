"""Our linear head's accuracy against scikit-learn's logistic regression on the same pooled features.

    python -m benchmarks.yardstick [dataset …]     # none named: the grid's classification sets

From `make run`'s stores and params.yaml. Test splits of 4 blocks of one scene say little, so the blocks are dealt
anew `DEALS` times, whole, with other seeds; each deal has its own statistics, search and test. Ours
is the whole protocol, 16 trials and the mean of ten seeds; logistic regression (L-BFGS) has as many values of C, the
best on validation. `points` is by how many points of test accuracy ours is better: its mean over deals, and its
standard error. `val_points` is the same on validation, on which both chose.
"""

import argparse
import json
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from benchmarks.deals import deal
from benchmarks.protocol import classification, protocol, stores
from cache.reader import FeatureStore
from pipeline import config
from pipeline.data import image_store
from pipeline.data.image_store import SPLITS
from pipeline.heads.config import HeadConfig
from pipeline.training import feature_inputs, loop, pca, task_data

DEALS = 10
STRENGTHS = (-5, 1)


def cell_of(described: config.Params, dataset: str, model: str, seed: int) -> task_data.TaskData:
    """A cell whose blocks are dealt anew."""
    members = [FeatureStore(path) for path in stores(dataset, model)]
    labelled = image_store.open_images(Path(f"data/images/{dataset}.zarr"))
    split = deal(labelled, described.dataset(dataset), seed)
    rows = {name: np.flatnonzero(split == name) for name in SPLITS}
    chosen, levels, parts = described.heads.linear, described.heads.levels, {}
    fields = [
        field for member in feature_inputs.select_pooled(members, chosen.pooled, chosen.tokens, levels) for field in member
    ]
    by = [feature_inputs.channel_stats(field, rows["train"]) for field in fields]
    for name, index in rows.items():
        inputs = feature_inputs.read_pooled(members, chosen.pooled, chosen.tokens, index, rows["train"], levels)
        label = torch.from_numpy(labelled.label.values[index].astype(np.int64))
        parts[name] = task_data.SplitData(inputs, label, members[0].sample[index].tolist())
    task, recipe = task_data.task_from_store(labelled), loop.TrainSchedule(chosen.steps, chosen.batch)
    blueprint = HeadConfig("linear", "concat", (((parts["train"].inputs.shape[1],),),), task.n_classes)
    turns = pca.principal_axes(fields, by, rows["train"])
    train = task_data.make_trainer(parts, task, recipe, blueprint, turns)
    return task_data.TaskData(parts, task, train, chosen.batch, [], [], [], blueprint)


def compare(dataset: str, model: str, seed: int) -> tuple[float, float]:
    """Points by which ours is better on test, and on validation."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    threadpool_limits(1)  # BLAS threads on products this small only wait for one another
    described = config.load()
    cell = cell_of(described, dataset, model, seed)
    of = {split: (part.inputs.numpy(), part.label.numpy()) for split, part in cell.splits.items()}
    tried, probe = [], LogisticRegression(max_iter=2000, warm_start=True)  # each C begins where the one before ended
    for strength in np.logspace(*STRENGTHS, described.search.trials):
        probe.set_params(C=strength).fit(*of["train"])
        tried.append((probe.score(*of["val"]), probe.score(*of["test"])))
    val, theirs = max(tried, key=lambda one: one[0])
    found, test = protocol(described, cell)
    return 100 * (float(test.mean()) - theirs), 100 * (found["score"] - val)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", nargs="*")
    wanted = parser.parse_args().datasets
    every = classification(config.load())
    if unknown := set(wanted) - {dataset for dataset, _ in every}:
        there = ", ".join(dict.fromkeys(dataset for dataset, _ in every))
        parser.error(f"there is no classification set {', '.join(sorted(unknown))} in the grid; there are {there}")
    chosen = [one for one in every if not wanted or one[0] in wanted]
    found: dict[str, dict] = {}
    with ProcessPoolExecutor() as pool:
        tasks = {one: [pool.submit(compare, *one, seed) for seed in range(DEALS)] for one in chosen}
        for (dataset, model), deals in tasks.items():
            points = np.array([task.result() for task in deals])
            error = points.std(axis=0, ddof=1) / np.sqrt(DEALS)
            found.setdefault(dataset, {})[model] = {
                "points": round(float(points[:, 0].mean()), 2), "error": round(float(error[0]), 2),
                "val_points": round(float(points[:, 1].mean()), 2), "each": points[:, 0].round(2).tolist(),
            }  # fmt: skip
            print(dataset, model, found[dataset][model], flush=True)
    means = {
        name: round(float(np.mean([one["points"] for one in models.values()])), 2) for name, models in found.items()
    }
    print(json.dumps({"yardstick": found, "points_mean": means}))


if __name__ == "__main__":
    main()
