"""Accuracy of our linear head, compared with logistic regression on the same pooled features.

    python -m benchmarks.yardstick [dataset …]     # by default the classification datasets of the grid

Needs the stores of `make run`. A test split of 4 blocks of one scene is small, so the blocks are assigned to the
splits `N_RESPLITS` times with other seeds; each time has its own statistics, search and test. Our head is trained by
the whole protocol: the search, and the mean over the seeds. scikit-learn's logistic regression (L-BFGS) has as many
values of C as the search has trials; the best on validation is used. `points` is our test accuracy minus the other,
in percentage points: the mean over the resplits, with its standard error in `error`. `val_points` is the same on
validation, on which both were selected.
"""

import argparse
import json
import warnings
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from benchmarks.protocol import classification_cells, feature_paths, run_protocol
from benchmarks.resplit import assign_splits
from cache.reader import FeatureStore
from pipeline import config
from pipeline.data import image_store
from pipeline.data.image_store import SPLITS
from pipeline.heads.config import HeadConfig
from pipeline.training import feature_loader, task_data
from pipeline.training.feature_loader import SplitData
from pipeline.training.loop import TrainSchedule

N_RESPLITS = 10
# Decimal logarithms of the smallest and largest C.
LOG_C_RANGE = (-5, 1)


def load_resplit(params: config.Params, dataset: str, model: str, seed: int) -> task_data.TaskData:
    """Load a dataset's pooled features for a model with its blocks assigned to the splits by another seed."""
    stores = [FeatureStore(path) for path in feature_paths(dataset, model)]
    images = image_store.open_images(Path(f"data/images/{dataset}.zarr"))
    split = assign_splits(images, params.dataset(dataset), seed)
    rows = {name: np.flatnonzero(split == name) for name in SPLITS}
    linear, levels = params.heads.linear, params.heads.levels
    arrays = list(chain(*feature_loader.select_pooled(stores, linear.pooled, linear.tokens, levels)))
    stats = [feature_loader.channel_stats(array, rows["train"]) for array in arrays]
    split_data = {}
    for name, index in rows.items():
        inputs = feature_loader.read_pooled(stores, linear.pooled, linear.tokens, index, rows["train"], levels)
        label = torch.from_numpy(images.label.values[index].astype(np.int64))
        split_data[name] = SplitData(inputs, label, stores[0].sample[index].tolist())
    task = task_data.task_from_store(images)
    return task_data.TaskData(
        splits=split_data,
        task=task,
        class_names=list(images.attrs["classes"]),
        array_names=[],
        mean_scale=[],
        rotations=task_data.principal_axes(arrays, stats, rows["train"]),
        head_config=HeadConfig("linear", "concat", (((split_data["train"].inputs.shape[1],),),), task.n_classes),
        schedule=TrainSchedule(linear.steps, linear.batch),
    )


def compare(dataset: str, model: str, seed: int) -> tuple[float, float]:
    """Return the percentage points by which our head is better on test, and on validation."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    threadpool_limits(1)  # BLAS threads on products this small only wait for one another
    params = config.load()
    data = load_resplit(params, dataset, model, seed)
    arrays = {split: (part.inputs.numpy(), part.label.numpy()) for split, part in data.splits.items()}
    scores, regression = [], LogisticRegression(max_iter=2000, warm_start=True)  # each C starts from the last fit
    for c in np.logspace(*LOG_C_RANGE, params.search.trials):
        regression.set_params(C=c).fit(*arrays["train"])
        scores.append((regression.score(*arrays["val"]), regression.score(*arrays["test"])))
    val, test = max(scores, key=lambda pair: pair[0])
    search_result, our_test = run_protocol(params, data)
    return 100 * (float(our_test.mean()) - test), 100 * (search_result["score"] - val)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", nargs="*")
    datasets = parser.parse_args().datasets
    cells = classification_cells(config.load())
    if unknown := set(datasets) - {dataset for dataset, _ in cells}:
        available = ", ".join(dict.fromkeys(dataset for dataset, _ in cells))
        parser.error(f"The grid has no classification dataset {', '.join(sorted(unknown))}; it has {available}.")
    cells = [cell for cell in cells if not datasets or cell[0] in datasets]
    results: dict[str, dict] = {}
    with ProcessPoolExecutor() as pool:
        futures = {cell: [pool.submit(compare, *cell, seed) for seed in range(N_RESPLITS)] for cell in cells}
        for (dataset, model), cell_futures in futures.items():
            points = np.array([future.result() for future in cell_futures])
            error = points.std(axis=0, ddof=1) / np.sqrt(N_RESPLITS)
            results.setdefault(dataset, {})[model] = {
                "points": round(float(points[:, 0].mean()), 2), "error": round(float(error[0]), 2),
                "val_points": round(float(points[:, 1].mean()), 2),
                "points_of_resplits": points[:, 0].round(2).tolist(),
            }  # fmt: skip
            print(dataset, model, results[dataset][model], flush=True)
    means = {
        dataset: round(float(np.mean([result["points"] for result in models.values()])), 2)
        for dataset, models in results.items()
    }
    print(json.dumps({"yardstick": results, "points_mean": means}))


if __name__ == "__main__":
    main()
