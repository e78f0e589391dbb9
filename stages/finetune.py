"""finetune: a model's backbones trained on from its best frozen head; none unless grid.finetune names some.

Of the test split it reads each sample once a seed, as train does.
"""

import shutil
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from cache.atomic import atomic_dir
from pipeline import config
from pipeline.data import image_store
from pipeline.errors import UserError
from stages.cli import FINETUNED, IMAGES, MODELS, RUNS, SCRATCH, WEIGHTS, read_json, run


def finetune(dataset: str, model: str) -> None:
    """Write runs.csv, one row a seed; predictions.parquet, one row a seed and test sample; and tuned.pt, what was
    trained of one seed."""
    described = config.load()
    described.members(model)
    if model not in described.grid.models:
        raise UserError(
            f"'{model}' is not in grid.models ({', '.join(described.grid.models)}), so there is no frozen head to "
            "start from. Add it there and run: dvc repro train"
        )
    resolved = read_json(MODELS / dataset / f"{model}.json")
    with atomic_dir(SCRATCH / f"finetune-{dataset}-{model}", FINETUNED / dataset / model) as folder:
        if resolved["skipped"]:
            pd.DataFrame(columns=["dataset", "model"]).to_csv(folder / "runs.csv", index=False)
            return
        checkpoints = _run(dataset, model, resolved, described, folder)
    shutil.rmtree(checkpoints)


def _run(dataset: str, model: str, resolved: dict, described: config.Params, folder: Path) -> Path:
    """Fill the folder; returns that of the checkpoints, which are needed no more once it is published."""
    import torch

    from pipeline.data.download import file_sha256
    from pipeline.device import resolve_device
    from pipeline.finetuning import protocol
    from pipeline.finetuning.model import EnsembleMember, FineTunedEnsemble, memory_hint
    from pipeline.finetuning.pictures import Pictures
    from pipeline.finetuning.train import FineTuneJob

    asked, head = described.finetune, RUNS / dataset / model / "head.pt"
    opened, where = image_store.open_images(IMAGES / f"{dataset}.zarr"), resolve_device(described.compute.device)
    precision = asked.precision if asked.precision != "auto" else "bfloat16" if where == "cuda" else "float32"
    members = [EnsembleMember(name, described.backbone(name), WEIGHTS / name) for name in model.split("+")]
    sources = [read_json(member.weights / "source.json") for member in members]  # or say which stage writes them

    def make(seed: int) -> FineTunedEnsemble:
        return FineTunedEnsemble(opened, members, head, asked, seed, where, precision)

    with memory_hint():
        make(0)  # before anything takes long: whether head, images and backbones belong together
        decides = [asdict(asked), resolved, where, precision, opened.attrs["content_sha256"], sources, file_sha256(head)]
        decides += [[asdict(member.backbone) for member in members], described.heads.class_weights]
        checkpoints = protocol.checkpoint_folder(SCRATCH / "finetune" / dataset / model, decides)
        pictures = Pictures(opened, checkpoints / "images.npy")
        job = FineTuneJob(pictures, protocol.make_task(opened, pictures, described.heads.class_weights), asked)
        weights = "+".join(str(member["weights"]) for member in resolved["members"])
        tested = protocol.run_fine_tuning(make, job, {"dataset": dataset, "model": model, "weights": weights}, checkpoints)
    tested.runs.to_csv(folder / "runs.csv", index=False)
    tested.predicted.to_parquet(folder / "predictions.parquet")
    torch.save(tested.best, folder / "tuned.pt")
    scores = tested.runs.score
    print(f"{dataset} {model}, {asked.protocol}: test {scores.mean():.4f}, the mean of {len(scores)} seeds")
    return checkpoints


if __name__ == "__main__":
    run(finetune, "dataset", "model")
