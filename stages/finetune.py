"""finetune: a model's backbones trained on from its best frozen head; none unless grid.finetune names some."""

import shutil
from dataclasses import asdict

import pandas as pd

from cache.durable import building
from pipeline import params
from pipeline.errors import UserError
from stages.cli import FINETUNED, IMAGES, MODELS, RUNS, SCRATCH, WEIGHTS, read_json, run


def finetune(dataset: str, model: str) -> None:
    """Write runs.csv, one row a seed; predictions.parquet, one row a seed and test sample; and tuned.pt, one seed's
    trained tensors."""
    described = params.load()
    members = described.members(model)
    if model not in described.grid.models:
        raise UserError(
            f"'{model}' is not in grid.models ({', '.join(described.grid.models)}), so there is no frozen head to "
            "start from. Add it there and run: dvc repro train"
        )
    resolved = read_json(MODELS / dataset / f"{model}.json")
    with building(SCRATCH / f"finetune-{dataset}-{model}", FINETUNED / dataset / model) as folder:
        if resolved["left_out"]:
            pd.DataFrame(columns=["dataset", "model"]).to_csv(folder / "runs.csv", index=False)
            return
        import numpy as np
        import torch

        from pipeline import images
        from pipeline.archives import digest
        from pipeline.compute import device
        from pipeline.finetune import protocol
        from pipeline.finetune.pictures import Pictures
        from pipeline.finetune.train import Job
        from pipeline.finetune.tuned import Member, Tuned, memory_hint

        asked, head = described.finetune, RUNS / dataset / model / "head.pt"
        where, opened = device(described.compute.device), images.open_images(IMAGES / f"{dataset}.zarr")
        precision = asked.precision if asked.precision != "auto" else "bfloat16" if where == "cuda" else "float32"
        chosen = [Member(name, described.backbone(name), WEIGHTS / name) for name in members]
        about = [
            asdict(asked),
            resolved,
            where,
            precision,
            opened.attrs["content_sha256"],
            described.heads.class_weights,
            [asdict(member.backbone) for member in chosen],
            [read_json(member.weights / "source.json") for member in chosen],
        ]

        def make(seed: int) -> Tuned:
            return Tuned(opened, chosen, head, asked, seed, where, precision)

        # Before anything takes long: whether head, images and networks belong together.
        make(0).check(opened.image[:1].values, np.array([0]))
        checkpoints = protocol.scratch(SCRATCH / "finetune" / dataset / model, [*about, digest(head)])
        pictures = Pictures(opened, checkpoints / "images.npy")
        job = Job(pictures, protocol.task(opened, pictures, described.heads.class_weights), asked)
        weights = "+".join(str(member["weights"]) for member in resolved["members"])
        with memory_hint():
            tested = protocol.run(make, job, {"dataset": dataset, "model": model, "weights": weights}, checkpoints)
        tested.runs.to_csv(folder / "runs.csv", index=False)
        tested.predicted.to_parquet(folder / "predictions.parquet")
        torch.save(tested.best, folder / "tuned.pt")
        scores = tested.runs.score
        print(f"{dataset} {model}, {asked.protocol}: test {scores.mean():.4f}, the mean of {len(scores)} seeds")
    shutil.rmtree(checkpoints)


if __name__ == "__main__":
    run(finetune, "dataset", "model")
