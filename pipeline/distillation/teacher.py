"""What the cache holds of the teachers: their features and, by the head that was trained on them, their answers.

The networks that made the features are not needed, and nothing here could load one.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from pipeline.distillation.chips import turned
from pipeline.errors import UserError
from pipeline.heads.checkpoint import TrainedHead
from pipeline.training import feature_inputs, task_data

# Samples that the head is asked about at once.
_STEP = 16
# Of a float16, in which answers are kept.
_LARGEST = float(np.finfo(np.float16).max)


class CachedTeacher:
    """An ensemble as its stores and its trained head.

    A store holds features of upright chips, and of the turned copies that `extract.views` names. Of a chip turned
    another way its maps are not known (turning features is not what the backbone would have said), and are not
    taught; what should not change by turning is: pooled vectors, classes, and what the head says of each place, which
    turns with the ground as a mask does.

    Args:
        stores: the members' stores, and the content digests they must have; None leaves that unchecked.
        pictures: the images store they were made from.
        head: of these members, in this order.
        rows: the samples that may be asked about.

    Attributes:
        views: turned copies whose features are known; `identity` is always.
        fields: names of the arrays, and their members' numbers; maps first.
        shapes: of these arrays, (channel, y, x) or (channel,).

    Raises:
        StoreError: a store that is missing or was made from other images.
        UserError: a head of other members or classes.
    """

    def __init__(self, stores: Mapping[Path, str | None], pictures: Path, head: TrainedHead, rows: np.ndarray):
        self.members, labelled = task_data.open_aligned(stores, pictures)
        names = [Path(path).stem for path in stores]
        if head.backbones != names or list(head.class_names) != list(labelled.attrs["classes"]):
            raise UserError(
                f"The trained head is of {head.model} for the classes {', '.join(head.class_names)}; the stores are of "
                f"{'+'.join(names)} for {', '.join(labelled.attrs['classes'])}. Run: dvc repro train"
            )
        self.head, self.views = head, self.members[0].view or ["identity"]
        numbered = list(enumerate(self.members))
        n_maps = [(place, f"{level}/features") for place, member in numbered for level in member.levels]
        self.arrays = n_maps + [(place, f"pooled/{name}") for place, member in numbered for name in member.pooled]
        self.maps = len(n_maps)
        self.shapes = [tuple(self.members[place].array(name).shape) for place, name in self.arrays]
        training = np.flatnonzero(self.members[0].split == "train")
        by = [feature_inputs.channel_stats((self.members[place], name), training) for place, name in self.arrays]
        self._by = [tuple(map(torch.from_numpy, feature_inputs.to_mean_scale(*one))) for one in by]
        self._place = {row: number for number, row in enumerate(rows.tolist())}
        self._answers = self._answered(rows)

    def features(self, rows: np.ndarray, views: Sequence[str]) -> list[torch.Tensor]:
        """The arrays of some samples, standardised by the training split's statistics, float32 (batch, channel, …).

        Of a sample whose view is not known they are those of its upright copy.
        """
        views = self._known(views)
        return [
            feature_inputs.standardise(self._read(place, name, rows, views), *by)
            for (place, name), by in zip(self.arrays, self._by, strict=True)
        ]

    def has_cached_view(self, views: Sequence[str]) -> torch.Tensor:
        """Whether the maps are those of the turned chips, bool (batch,)."""
        return torch.tensor([view in self.views for view in views])

    def logits(self, rows: np.ndarray, views: Sequence[str]) -> torch.Tensor:
        """What the head says, float32 (batch, class) or (batch, class, y, x), turned as the chips are."""
        known = self._known(views)
        places = [self._place[row] for row in rows.tolist()]
        copies = [self.views.index(view) for view in known]
        said = self._answers[places, copies].astype(np.float32)
        if said.ndim == 4:
            left = ["identity" if view in self.views else view for view in views]
            said = np.ascontiguousarray(turned(said, left))
        return torch.from_numpy(said)

    def _known(self, views: Sequence[str]) -> list[str]:
        return [view if view in self.views else "identity" for view in views]

    def _read(self, place: int, name: str, rows: np.ndarray, views: Sequence[str]) -> torch.Tensor:
        """Rows of an array as they are stored, each of its view, float32."""
        member, views = self.members[place], np.asarray(views)
        if not member.view:
            return torch.from_numpy(member.read(name, rows)).float()
        values = torch.empty(len(rows), *member.array(name).shape)
        for view in np.unique(views).tolist():
            mine = np.flatnonzero(views == view)
            values[torch.from_numpy(mine)] = torch.from_numpy(member.read(name, rows[mine], view)).float()
        return values

    @torch.inference_mode()
    def _answered(self, rows: np.ndarray) -> np.ndarray:
        """What the head says of every copy, float16 (sample, view, class, …), in an unnamed file: masks are many."""
        answers, device = None, self.head.mean_scale[0][0].device
        for copy, view in enumerate(self.views):
            for start in range(0, len(rows), _STEP):
                some = rows[start : start + _STEP]
                given = [
                    {name: self._read(place, name, some, [view] * len(some)).to(device) for name in names}
                    for place, names in enumerate(self.head.array_names)
                ]
                said = self.head.logits(given).float().cpu().numpy()
                if answers is None:
                    shape = (len(rows), len(self.views), *said.shape[1:])
                    with TemporaryDirectory() as folder:  # what is mapped lives on without its name
                        answers = np.memmap(Path(folder, "answers"), np.float16, "w+", shape=shape)
                answers[start : start + _STEP, copy] = said.clip(-_LARGEST, _LARGEST)
        return answers
