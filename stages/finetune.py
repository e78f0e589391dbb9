"""finetune: fine-tune the backbones of the models in grid.finetune.

Fine-tuning starts from the frozen backbones and their best head. The test split is read once per seed, as in train.
"""

import shutil
from dataclasses import asdict
from pathlib import Path

from pipeline import config
from pipeline.data import image_store
from pipeline.errors import UserError
from stages import cli


def finetune(dataset: str, model: str) -> None:
    """Write results/finetune/<dataset>/<model>.

    runs.csv has one row per seed, predictions.parquet one row per seed and test sample, tuned.pt the trained weights
    of the best seed on validation.
    """
    params = cli.load_params(dataset)
    params.members(model)
    if model not in params.grid.models:
        raise UserError(
            f"'{model}' is not in grid.models ({', '.join(params.grid.models)}), so there is no head on frozen "
            "features to start from. Add it there and run: dvc repro train",
            key="grid.models", value=model, allowed=params.grid.models,
        )  # fmt: skip
    resolved = cli.read_json(cli.MODELS / dataset / f"{model}.json")
    with cli.publish_folder(cli.FINETUNING / dataset / model) as folder:
        if resolved["skipped"]:
            cli.write_text(folder / "runs.csv", cli.NO_RUNS)
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

    settings, weighting = params.finetune, params.heads.class_weights
    head, images = cli.HEADS / dataset / model / "head.pt", image_store.open_images(cli.images_path(dataset))
    device = resolve_device(params.compute.device)
    precision = settings.precision if settings.precision != "auto" else "bfloat16" if device == "cuda" else "float32"
    members = [EnsembleMember(name, params.backbone(name), cli.WEIGHTS / name) for name in params.members(model)]
    sources = [cli.read_json(member.weights_dir / "source.json") for member in members]

    def create_ensemble(seed: int) -> FineTunedEnsemble:
        return FineTunedEnsemble(images, members, head, settings, seed, device, precision)

    with memory_hint():
        create_ensemble(0)  # checks that head, images and backbones match, before anything takes long
        backbones = [asdict(member.backbone) for member in members]
        cache_key = [asdict(settings), resolved, device, precision, images.attrs["content_sha256"], sources]
        cache_key += [file_sha256(head), backbones, weighting]
        checkpoints = train.checkpoint_folder(cli.SCRATCH / "finetune" / dataset / model, cache_key)
        augmented = AugmentedImages.copy_to_file(images, checkpoints / "images.npy")
        job = train.FineTuneJob(augmented, train.make_task(augmented, weighting), settings)
        row = {"dataset": dataset, "model": model, "weights": cli.weights_of(resolved)}
        result = train.run_fine_tuning(create_ensemble, job, row, checkpoints)
    cli.write_runs(folder, result)
    torch.save(result.best_tensors, folder / "tuned.pt")
    scores = result.runs.score
    print(f"{dataset} {model}, {settings.protocol}: test {scores.mean():.4f}, mean of {len(scores)} seeds")
    return checkpoints


if __name__ == "__main__":
    cli.run(finetune)
