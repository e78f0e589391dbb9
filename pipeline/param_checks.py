"""What params.yaml may say, beyond the types of its records (params.py)."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import TYPE_CHECKING

from cache import codecs
from pipeline.data.augmentation import VIEWS
from pipeline.errors import UserError
from pipeline.finetune_config import check as check_finetune
from pipeline.student_params import check as check_students
from pipeline.student_params import check_search

if TYPE_CHECKING:
    from pipeline.config import HeadsConfig, Params

TASKS = ("classification", "multilabel", "segmentation")


def check(params: Params) -> None:
    """Refuse names that are not described and values that could not be run.

    Raises:
        UserError: what was given, and what may be.
    """
    for axis in ("datasets", "backbones", "models"):
        names = getattr(params.grid, axis)
        if not names or len(set(names)) != len(names):
            raise UserError(f"grid.{axis} is {list(names)}; it must name at least one, and each once.")
    for name in (*params.datasets, *params.backbones):
        # It becomes a file's name, and one of a model's.
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
            raise UserError(
                f"'{name}' is no name here; one has letters, digits, '_' and '-', and no others: to DVC a dot would "
                "begin another level of params.yaml."
            )
    for name in params.grid.datasets:
        params.dataset(name)
    for name in params.grid.backbones:
        params.backbone(name)
    same = [sorted(params.members(model)) for model in params.grid.models]
    if twice := [model for model, members in zip(params.grid.models, same, strict=True) if same.count(members) > 1]:
        raise UserError(f"grid.models has {' and '.join(twice)}, which are the same ensemble. Name each once.")
    for model in params.grid.models:
        for name in params.members(model):
            if name not in params.grid.backbones:
                raise UserError(
                    f"grid.models has '{model}', but its backbone '{name}' is not in grid.backbones "
                    f"({', '.join(params.grid.backbones)}), so nothing would extract its features. Add it there."
                )
    for model in params.grid.finetune:
        if model not in params.grid.models or params.grid.finetune.count(model) > 1:
            raise UserError(
                f"grid.finetune is {list(params.grid.finetune)}; it must name models of grid.models "
                f"({', '.join(params.grid.models)}), whose frozen heads are the start, and each once."
            )
    check_finetune(params.finetune)
    for name, dataset in params.datasets.items():
        _one_of(dataset.task, ("", *TASKS), f"datasets.{name}.task")
        fractions = dataclasses.astuple(dataset.splits) if dataset.splits else (1,)
        if min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
            raise UserError(
                f"datasets.{name}.splits are {fractions}; train, val and test must be positive and sum to 1."
            )
        for key in ("seed", "chip", "block"):
            _not_negative(f"datasets.{name}.{key}", getattr(dataset, key))
        if dataset.chip and dataset.block % dataset.chip:
            raise UserError(
                f"datasets.{name} has chip {dataset.chip} and block {dataset.block}; the block must be a "
                "multiple of the chip, so that no chip reaches into another split's block."
            )
    for name, backbone in params.backbones.items():
        _one_of(backbone.weights, ("pretrained", "random", "none"), f"backbones.{name}.weights")
        _not_negative(f"backbones.{name}.seed", backbone.seed)
        _one_of(backbone.normalisation, ("native", "dataset"), f"backbones.{name}.normalisation")
        _one_of(backbone.eats, ("", "reflectance", "display", "unit"), f"backbones.{name}.eats")
        _positive(f"backbones.{name}", input_size=backbone.input_size)
    _one_of(params.extract.dtype, ("float16", "float32"), "extract.dtype")
    _one_of(params.extract.precision, ("float32", "bfloat16", "float16"), "extract.precision")
    try:
        codecs.parse(params.extract.codec, params.extract.dtype)
    except ValueError as error:
        raise UserError(f"extract.codec: {error}.") from None
    views = params.extract.views
    for view in views:
        _one_of(view, tuple(VIEWS), "extract.views")
    if views[:1] != ("identity",) or len(set(views)) != len(views):
        raise UserError(f"extract.views is {list(views)}; it must begin with identity and name each view once.")
    _check_heads(params.heads)
    _one_of(params.compute.device, ("auto", "cpu", "cuda"), "compute.device")
    _positive("extract", shard=params.extract.shard)
    for key, value in (("extract.batch", params.extract.batch), ("compute.workers", params.compute.workers)):
        if value < 0:
            raise UserError(f"{key} is {value}; it must not be negative.")
    check_search("search", params.search)
    for name in params.distill.datasets:
        params.dataset(name)
    check_students(params.students, params.distill, params.grid, params.backbones)
    _positive("train", seeds=params.train.seeds)
    _check_compose(params)


def _check_compose(params: Params) -> None:
    names = params.compose.backbones
    for name in names:
        params.backbone(name)
        if name not in params.grid.backbones:
            raise UserError(
                f"compose.backbones has '{name}', which is not in grid.backbones "
                f"({', '.join(params.grid.backbones)}), so nothing would extract its features. Add it there."
            )
    if len(set(names)) != len(names):
        raise UserError(f"compose.backbones is {list(names)}; name each once.")
    _one_of(params.compose.probe, ("logistic", "knn"), "compose.probe")
    if params.compose.best < 0:
        raise UserError(f"compose.best is {params.compose.best}; it must not be negative.")


def _check_heads(heads: HeadsConfig) -> None:
    _one_of(heads.linear.pooled, ("last", "all"), "heads.linear.pooled")
    _one_of(heads.linear.tokens, ("mean", "cls", "both"), "heads.linear.tokens")
    _one_of(heads.segmentation, ("upernet", "fcn"), "heads.segmentation")
    _one_of(heads.fusion, ("concat", "average", "film", "dot"), "heads.fusion")
    _one_of(heads.class_weights, ("none", "balanced"), "heads.class_weights")
    _one_of(heads.precision, ("auto", "float32", "bfloat16"), "heads.precision")
    _positive("heads", checks=heads.checks)
    if not 0 <= heads.memory < math.inf:
        raise UserError(
            f"heads.memory is {heads.memory}; it must not be negative, and a number. 0 streams every set."
        )
    for name in ("linear", "upernet", "fcn"):
        head = getattr(heads, name)
        _positive(f"heads.{name}", steps=head.steps, batch=head.batch)
        if head.patience < 0:
            raise UserError(f"heads.{name}.patience is {head.patience}; it must not be negative. 0 trains all steps.")
    _positive("heads.upernet", channels=heads.upernet.channels)
    if heads.upernet.batch < 2:
        raise UserError(
            "heads.upernet.batch is 1; it must be at least 2, since BatchNorm cannot train on one sample."
        )


def _one_of(value: str, allowed: tuple[str, ...], key: str) -> None:
    if value not in allowed:
        raise UserError(f"{key} is '{value}'; it must be one of: {', '.join(allowed)}.")


def _positive(section: str, **values: int) -> None:
    for key, value in values.items():
        if value < 1:
            raise UserError(f"{section}.{key} is {value}; it must be at least 1.")


def _not_negative(key: str, value: int) -> None:
    if value < 0:
        raise UserError(f"{key} is {value}; it must not be negative.")
