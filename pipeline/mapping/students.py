"""A student as it was trained, in torch, as a predictor."""

import hashlib
from pathlib import Path

import torch

from pipeline.distillation import student_files
from pipeline.mapping.signature import Predictor, parse_signature


def load_student(folder: Path, device: str) -> Predictor:
    """The student that a folder holds.

    Raises:
        UserError: it holds none.
    """
    folder = Path(folder)
    student, told = student_files.load_student(folder)
    student = student.to(device).eval()

    @torch.inference_mode()
    def logits(chips, known):
        return student(torch.from_numpy(chips).to(device)).float().cpu().numpy()

    name = f"{told['dataset']}, {told['architecture']} ({told['variant']})"
    digest = hashlib.sha256()
    for file in ("student.pt", "student.json"):
        digest.update((folder / file).read_bytes())
    return Predictor(name, digest.hexdigest(), parse_signature(told, str(folder)), logits)
