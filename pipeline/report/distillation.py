"""The report's part on students: what distillation keeps of an ensemble, and at what cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.report import figures, page
from pipeline.report.significance import BootstrapSamples, paired_difference, percentile_interval

Drawn = Mapping[tuple[str, str], BootstrapSamples]


@dataclass(frozen=True)
class StudentResult:
    """What the distill stage wrote of one student on one data set: its metadata.json."""

    metadata: Mapping

    @property
    def dataset(self) -> str:
        return self.metadata["dataset"]

    @property
    def name(self) -> str:
        return self.metadata["student"]

    @property
    def teacher(self) -> str:
        return self.metadata["teacher"]


def students_section(
    learned: Sequence[StudentResult], summary: pd.DataFrame, drawn: Drawn, costs: pd.DataFrame, folder: Path
) -> tuple[str, list[str]]:
    """HTML, and a sentence for every student; the picture is written to `folder` too.

    Args:
        summary, drawn: of all runs, frozen ones and students' (pipeline/report/page.py).
        costs: as pipeline/cost.py measures them, with the data set.
    """
    if not learned:
        return "", []
    parts, said, points = [], [], []
    for one in learned:
        if one.metadata["skipped"]:
            said.append(f"{one.dataset}: no student {one.name}: {one.metadata['skipped']}")
            continue
        rows = _rows(one, summary, costs)
        began = {"random": "random weights", "pretrained": "trained weights"}[one.metadata["weights"]]
        parts.append(page.html_table(_table(rows), f"{one.dataset}: student {one.name}, from {began}."))
        said.append(gain_recovered(one, drawn) + _cost_sentence(one, rows))
        points.append(rows)
    picture = ""
    if points:
        figures.draw_score_against_cost(pd.concat(points, ignore_index=True), folder / "students.png")
        picture = page.embedded_image(folder / "students.png", "Score against cost, a panel a data set")
    return (
        "<h2>Students</h2><p>A student is one compact network that reads the chips themselves. <i>distilled</i>: it "
        "learned from the cached features of the teacher's backbones, from the teacher's answers, and from labels; "
        "<i>labels alone</i>: the same network, start, steps and search without a teacher, the control that tells "
        "whether distillation did anything. Both are trained networks, and so another protocol than the frozen "
        "models beside them. The teacher has seen the labels of the training split, as they have. Costs are from a "
        "stored chip to its logits, with all backbones that a model needs.</p>"
        f"{page.html_list(said)}{picture}{''.join(parts)}"
    ), said


def gain_recovered(one: StudentResult, drawn: Drawn) -> str:
    """How much of the teacher's gain over the student from labels alone the distilled student keeps."""
    ours, control, teacher = (
        drawn[one.dataset, name] for name in (f"{one.name} (distilled)", f"{one.name} (supervised)", one.teacher)
    )
    gain, did = paired_difference(teacher, control), paired_difference(ours, control)
    effect = {
        "better": "Distillation helps",
        "worse": "Distillation harms",
        "cannot be told": "Whether distillation did anything cannot be told with this test set",
    }[did.verdict]
    effect = f"{effect} ({did.mean:+.3f} over labels alone, 95 % interval {_interval(did.both)})."
    about = f"{gain.mean:+.3f}, {_interval(gain.both)}"
    start = f"{one.dataset}, student {one.name}, teacher {one.teacher}:"
    if gain.verdict == "worse":
        return f"{start} {effect} The teacher is worse than labels alone ({about}); there is no gain to keep."
    if gain.verdict != "better":
        return (
            f"{start} {effect} How much of the teacher's gain it keeps cannot be told: the teacher itself cannot be "
            f"told apart from labels alone with this test set ({about})."
        )
    share = did.mean / gain.mean
    low, high = percentile_interval((ours.both - control.both) / (teacher.both - control.both))
    return (
        f"{start} {effect} It keeps {share:.0%} of the teacher's gain over labels alone ({about}), 95 % interval "
        f"{low:.0%} to {high:.0%}."
    )


def _cost_sentence(one: StudentResult, rows: pd.DataFrame) -> str:
    """What the student costs against its teacher, on a processor."""
    ours, teacher = (rows[rows.shown == name].iloc[0] for name in (f"{one.name} (distilled)", one.teacher))
    if not np.isfinite(ours.chips_per_second / teacher.chips_per_second):
        return ""
    return (
        f" It has {ours.parameters / teacher.parameters:.1%} of the teacher's parameters, takes "
        f"{ours.flops / teacher.flops:.1%} of its operations, and reads {ours.chips_per_second:.0f} chips a second "
        f"where the teacher reads {teacher.chips_per_second:.0f} ({teacher.cores:.0f} cores)."
    )


def _rows(one: StudentResult, summary: pd.DataFrame, costs: pd.DataFrame) -> pd.DataFrame:
    """The student's variants, its teacher and the teacher's members alone, with what each costs."""
    members = [name for name in one.teacher.split("+") if name != one.teacher]
    models = [one.teacher, *members, *[f"{one.name} ({variant})" for variant in one.metadata["variants"]]]
    own = summary[summary.dataset == one.dataset].set_index("model")
    table = own.loc[[name for name in models if name in own.index]].reset_index(names="shown")
    role = {one.teacher: "teacher", **dict.fromkeys(members, "member")}
    table["role"] = [role.get(name, "student") for name in table.shown]
    table["model"] = table.shown.where(table.role != "student", one.name)
    here = costs[costs.dataset == one.dataset]
    gpu = here[here.device != "cpu"].set_index("model").chips_per_second
    table["gpu"] = table.model.map(gpu)
    return table.merge(here[here.device == "cpu"].drop(columns="dataset"), on="model", how="left")


def _table(rows: pd.DataFrame) -> pd.DataFrame:
    """Every cell text."""
    cores = rows.cores.max()
    text = {
        "model": rows.shown,
        "is": rows.role,
        "protocol": rows.protocol,
        f"test {rows.metric.iloc[0]}, mean ± std over seeds": [page.format_score(row) for row in rows.itertuples()],
        "95 % interval": [f"{row.low:.3f}–{row.high:.3f}" for row in rows.itertuples()],
        "million parameters": [_number(value, 1e6, "{:.2f}") for value in rows.parameters],
        "GFLOP a chip": [_number(value, 1e9, "{:.3f}") for value in rows.flops],
        f"chips a second, {cores:.0f} cores": [_number(value, 1, "{:.0f}") for value in rows.chips_per_second],
        "MB on disk": [_number(value, 1e6, "{:.1f}") for value in rows.bytes],
    }
    if rows.gpu.notna().any():
        text["chips a second, GPU"] = [_number(value, 1, "{:.0f}") for value in rows.gpu]
    return pd.DataFrame(text)


def _number(value: float, unit: float, form: str) -> str:
    return form.format(value / unit) if np.isfinite(value) else "–"


def _interval(bounds: tuple[float, float]) -> str:
    return f"{bounds[0]:+.3f} to {bounds[1]:+.3f}"
