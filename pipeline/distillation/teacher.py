"""Cached features and logits of a teacher. No backbone is run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import torch

from pipeline.data.augmentation import apply_views
from pipeline.errors import UserError
from pipeline.heads.checkpoint import TrainedHead
from pipeline.training import feature_loader, task_data

# Samples per forward pass of the head.
HEAD_BATCH = 16
# Logits are stored as float16; larger ones are clipped.
MAX_FLOAT16 = float(np.finfo(np.float16).max)


class CachedTeacher:
    """Features and logits of an ensemble, from its feature stores and its trained head.

    A store contains the features of upright chips and of the views that `extract.views` names. For any other view the
    feature maps are unknown: rotating features differs from the features of a rotated image. Three things do not
    depend on the view and are available for all: pooled vectors and class logits (approximately), and the logits of
    each pixel, which rotate with the image like a mask.

    Args:
        stores: feature stores of the members and their expected content digests; None for no check.
        head: trained on these members, in this order; another head is refused.
        rows: indices of the samples whose logits are needed, (sample,).

    Attributes:
        views: names of the views with cached features; `identity` is always among them.
        arrays: (index of the member, name of the array in its store) of every feature array; maps come first.
        shapes: shape of each array, (channel, y, x) or (channel,).
    """

    def __init__(self, stores: Mapping[Path, str | None], images_path: Path, head: TrainedHead, rows: np.ndarray):
        self.members, images = task_data.open_aligned(stores, images_path)
        names, classes = [Path(path).stem for path in stores], list(images.attrs["classes"])
        if head.backbones != names or list(head.class_names) != classes:
            raise UserError(
                f"The trained head is for the model {head.model} and the classes {', '.join(head.class_names)}; the "
                f"stores have {'+'.join(names)} and the classes {', '.join(classes)}. Run: dvc repro train",
                key="head", value=head.model, allowed=["+".join(names)],
            )  # fmt: skip
        self.head = head
        self.views = self.members[0].view or ["identity"]
        maps = [(index, name) for index, member in enumerate(self.members) for name in member.level_arrays]
        vectors = [(index, name) for index, member in enumerate(self.members) for name in member.pooled_arrays]
        self.arrays, self.n_maps = maps + vectors, len(maps)
        self.shapes = [tuple(self.members[index].array(name).shape) for index, name in self.arrays]
        training = np.flatnonzero(self.members[0].split == "train")
        stats = [feature_loader.channel_stats((self.members[index], name), training) for index, name in self.arrays]
        self._mean_scale = [tuple(map(torch.from_numpy, feature_loader.to_mean_scale(*pair))) for pair in stats]
        self._position = {row: position for position, row in enumerate(rows.tolist())}
        self._logits = self._compute_logits(rows)

    def features(self, rows: np.ndarray, views: Sequence[str]) -> list[torch.Tensor]:
        """Read each of `arrays`, float32 (batch, channel, …), standardized by the training split's statistics.

        A view without cached features gets those of the upright chip.
        """
        views = self._cached_views(views)
        return [
            feature_loader.standardize_(self._read(index, name, rows, views), *mean_scale)
            for (index, name), mean_scale in zip(self.arrays, self._mean_scale, strict=True)
        ]

    def has_cached_view(self, views: Sequence[str]) -> torch.Tensor:
        """Return whether each view has cached feature maps, bool (batch,)."""
        return torch.tensor([view in self.views for view in views])

    def logits(self, rows: np.ndarray, views: Sequence[str]) -> torch.Tensor:
        """Return the head's logits, float32 (batch, class), or (batch, class, y, x) transformed by each view."""
        positions = [self._position[row] for row in rows.tolist()]
        copies = [self.views.index(view) for view in self._cached_views(views)]
        logits = self._logits[positions, copies].astype(np.float32)
        if logits.ndim == 4:
            remaining = ["identity" if view in self.views else view for view in views]
            logits = np.ascontiguousarray(apply_views(logits, remaining))
        return torch.from_numpy(logits)

    def _cached_views(self, views: Sequence[str]) -> list[str]:
        return [view if view in self.views else "identity" for view in views]

    def _read(self, index: int, name: str, rows: np.ndarray, views: Sequence[str]) -> torch.Tensor:
        """Read rows of a member's array, each of its own view, as float32."""
        member, view_names = self.members[index], np.asarray(views)
        if not member.view:
            return torch.from_numpy(member.read(name, rows)).float()
        values = torch.empty(len(rows), *member.array(name).shape)
        for view in np.unique(view_names).tolist():
            selected = np.flatnonzero(view_names == view)
            values[torch.from_numpy(selected)] = torch.from_numpy(member.read(name, rows[selected], view)).float()
        return values

    @torch.inference_mode()
    def _compute_logits(self, rows: np.ndarray) -> np.ndarray:
        """Compute logits, float16 (sample, view, class, …), in a mapped file: they can exceed the memory."""
        stored, device = np.empty(0, np.float16), self.head.mean_scale[0][0].device
        for copy, view in enumerate(self.views):
            for start in range(0, len(rows), HEAD_BATCH):
                batch = rows[start : start + HEAD_BATCH]
                features = [
                    {name: self._read(index, name, batch, [view] * len(batch)).to(device) for name in names}
                    for index, names in enumerate(self.head.array_names)
                ]
                logits = self.head.logits(features).float().cpu().numpy()
                if not stored.size:
                    shape = (len(rows), len(self.views), *logits.shape[1:])
                    with TemporaryFile() as file:  # the mapping outlives it
                        stored = np.memmap(file, np.float16, "w+", shape=shape)
                stored[start : start + HEAD_BATCH, copy] = logits.clip(-MAX_FLOAT16, MAX_FLOAT16)
        return stored
