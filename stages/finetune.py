"""finetune: fine-tune the backbones of the models in grid.finetune.

Fine-tuning starts from the frozen backbones and their best head. The test split is read once per seed, as in train.
"""

import shutil
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from cache.atomic import atomic_dir
from pipeline import config
from pipeline.data import image_store
from pipeline.errors import UserError
from stages.cli import FINETUNING, HEADS, IMAGES, MODELS, SCRATCH, WEIGHTS, read_json, run


def finetune(dataset: str, model: str) -> None:
    """Write results/finetune/<dataset>/<model>.

    runs.csv has one row per seed, predictions.parquet one row per seed and test sample, tuned.pt the trained weights
    of the best seed on validation.
    """
    params = config.load()
    params.members(model)
    if model not in params.grid.models:
        raise UserError(
            f"'{model}' is not in grid.models ({', '.join(params.grid.models)}), so there is no head on frozen "
            "features to start from. Add it there and run: dvc repro train",
            key="grid.models",
            value=model,
            allowed=params.grid.models,
        )
    resolved = read_json(MODELS / dataset / f"{model}.json")
    with atomic_dir(SCRATCH / f"finetune-{dataset}-{model}", FINETUNING / dataset / model) as folder:
        if resolved["skipped"]:
            pd.DataFrame(columns=["dataset", "model"]).to_csv(folder / "runs.csv", index=False)
            return
        checkpoints = _fine_tune(dataset, model, resolved, params, folder)
    shutil.rmtree(checkpoints)


def _fine_tune(dataset: str, model: str, resolved: dict, params: config.Params, folder: Path) -> Path:
    """Fine-tune all seeds and write the results to a folder.

    Returns:
        The folder of the checkpoints, which the caller deletes once the results are published.
    """
    # torch takes 3 s to import; a skipped model needs none of it
    import torch

    from pipeline.data.augmentation import AugmentedImages
    from pipeline.data.download import file_sha256
    from pipeline.device import resolve_device
    from pipeline.finetuning import train
    from pipeline.finetuning.model import EnsembleMember, FineTunedEnsemble, memory_hint
    from pipeline.finetuning.train import FineTuneJob

    settings, head = params.finetune, HEADS / dataset / model / "head.pt"
    images, device = image_store.open_images(IMAGES / f"{dataset}.zarr"), resolve_device(params.compute.device)
    precision = settings.precision if settings.precision != "auto" else "bfloat16" if device == "cuda" else "float32"
    members = [EnsembleMember(name, params.backbone(name), WEIGHTS / name) for name in model.split("+")]
    sources = [read_json(member.weights_dir / "source.json") for member in members]

    def create_ensemble(seed: int) -> FineTunedEnsemble:
        return FineTunedEnsemble(images, members, head, settings, seed, device, precision)

    with memory_hint():
        create_ensemble(0)  # checks that head, images and backbones match, before anything takes long
        cache_key = [
            asdict(settings),
            resolved,
            device,
            precision,
            images.attrs["content_sha256"],
            sources,
            file_sha256(head),
        ]
        cache_key += [[asdict(member.backbone) for member in members], params.heads.class_weights]
        checkpoints = train.checkpoint_folder(SCRATCH / "finetune" / dataset / model, cache_key)
        augmented_images = AugmentedImages.copy_to_file(images, checkpoints / "images.npy")
        job = FineTuneJob(
            augmented_images, train.make_task(images, augmented_images, params.heads.class_weights), settings
        )
        weights = "+".join(str(member["weights"]) for member in resolved["members"])
        result = train.run_fine_tuning(
            create_ensemble, job, {"dataset": dataset, "model": model, "weights": weights}, checkpoints
        )
    result.runs.to_csv(folder / "runs.csv", index=False)
    result.predicted.to_parquet(folder / "predictions.parquet")
    torch.save(result.best_tensors, folder / "tuned.pt")
    scores = result.runs.score
    print(f"{dataset} {model}, {settings.protocol}: test {scores.mean():.4f}, mean of {len(scores)} seeds")
    return checkpoints


if __name__ == "__main__":
    run(finetune, "dataset", "model")
