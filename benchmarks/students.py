"""How much cheaper a student is to use than its teacher, after `make run`.

    python -m benchmarks.students

Of every data set and student: `faster`, how many times as many chips a second on this processor, as the median over
alternating rounds; `smaller`, times fewer parameters; `fewer_operations`. Both take stored chips to logits.
"""

import json
from functools import partial

import torch

from benchmarks.timing import ratio
from pipeline import config, cost
from pipeline.data import image_store
from stages.cli import DISTILLATION, IMAGES, read_json
from stages.cost import benchmarked_models

ROUNDS = 7


def main() -> None:
    described, found = config.load(), {"cores": torch.get_num_threads()}
    for dataset in described.grid.datasets:
        models = benchmarked_models(described, dataset, "cpu")
        chips = image_store.open_images(IMAGES / f"{dataset}.zarr").image[: cost.BATCH_CHIPS].values
        for name in described.grid.students:
            told = read_json(DISTILLATION / dataset / name / "metadata.json")
            if told["skipped"]:
                continue
            ours, theirs = models[name], models[told["teacher"]]
            with torch.no_grad():
                faster = ratio(partial(ours.predict, chips), partial(theirs.predict, chips), ROUNDS)
            work = [cost.flops(partial(one.predict, chips[:1])) for one in (theirs, ours)]
            found[f"{dataset} {name} against {told['teacher']}"] = {
                "faster": round(faster, 2),
                "smaller": round(_size(theirs) / _size(ours), 1),
                "fewer_operations": round(work[0] / work[1], 1),
            }
    print(json.dumps(found, indent=1))


def _size(one: cost.BenchmarkedModel) -> int:
    return sum(tensor.numel() for module in one.modules for tensor in module.parameters())


if __name__ == "__main__":
    main()
