"""Which model of the grid a student learns from, on one data set; needs no torch."""

from collections.abc import Mapping

from pipeline.config import Params


def choose_teacher(described: Params, dataset: str, tuned: Mapping[str, Mapping]) -> tuple[str | None, str | None]:
    """The teacher's name; or None and why there is none on this data set.

    `best` is the best by validation score of the models that have a trained network: random controls teach nothing,
    and a student of the raw bands' mean and spread would be larger than its teacher. Of equals the one with more
    members, and then the first of the grid.

    Args:
        tuned: of every model of the grid, what `tune` wrote: `skipped`, and else `score` on validation.
    """
    if not described.distill.applies_to(dataset):
        return None, f"distill.datasets in params.yaml names {', '.join(described.distill.datasets)}."
    wanted = described.distill.teacher
    if wanted != "best":
        reason = tuned[wanted]["skipped"]
        if any(described.backbone(name).weights == "random" for name in described.members(wanted)):
            reason = f"{wanted} has random weights; a control is no teacher."
        return (None, f"The teacher {wanted} is left out: {reason}") if reason else (wanted, None)
    able = {}
    for model in described.grid.models:
        weights = {described.backbone(name).weights for name in described.members(model)}
        if not tuned[model]["skipped"] and "pretrained" in weights and "random" not in weights:
            able[model] = (tuned[model]["score"], model.count("+"))
    if not able:
        return None, "No model of the grid with a trained network can see these images, so there is no teacher."
    return max(able, key=able.get), None
