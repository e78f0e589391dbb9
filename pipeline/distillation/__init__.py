"""Distillation of cached teachers into compact students; no backbone is run.

The choice of the teacher is here, because the stage that makes it needs no torch, which takes 3 s to import.
"""

from collections.abc import Mapping

from pipeline.config import Params


def choose_teacher(params: Params, dataset: str, tuning: Mapping[str, Mapping]) -> tuple[str | None, str | None]:
    """Choose the teacher on a dataset from the models of the grid; or None, and the reason.

    With `distill.teacher: best` it is the model with the best validation score among those that have a pretrained
    network. Models with random weights are no useful teachers, and a student of the band statistics baseline would be
    larger than its teacher. Ties: the model with more members wins, then the first of the grid. `tuning` is the
    result of the stage `tune` for every model of the grid: `skipped` (a reason or None), and `score` on validation.
    """
    teacher, datasets = params.distill.teacher, params.distill.datasets
    if not params.distill.applies_to(dataset):
        return None, f"distill.datasets in params.yaml names {', '.join(datasets)}."
    weights = {
        model: {params.backbone(name).weights for name in params.members(model)} for model in params.grid.models
    }
    if teacher != "best":
        reason = tuning[teacher]["skipped"]
        if "random" in weights[teacher]:
            reason = f"{teacher} has random weights. Choose a model with pretrained weights."
        return (None, f"The teacher {teacher} is skipped: {reason}") if reason else (teacher, None)
    candidates = {
        model: (tuning[model]["score"], model.count("+"))
        for model in params.grid.models
        if not tuning[model]["skipped"] and "pretrained" in weights[model] and "random" not in weights[model]
    }
    if not candidates:
        return None, "No model of the grid with a pretrained network can use these images, so there is no teacher."
    return max(candidates, key=candidates.get), None
