"""Cost of a student compared with its teacher, after `make run`.

    python -m benchmarks.students

For every dataset and student: `faster`, how many times as many chips per second on this CPU, the median over
alternating rounds; `smaller`, how many times fewer parameters; `fewer_operations`, how many times fewer
floating-point operations. Both models take stored chips to logits.
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
    params, results = config.load(), {"cores": torch.get_num_threads()}
    for dataset in params.grid.datasets:
        models = benchmarked_models(params, dataset, "cpu")
        chips = image_store.open_images(IMAGES / f"{dataset}.zarr").image[: cost.BATCH_CHIPS].values
        for name in params.grid.students:
            metadata = read_json(DISTILLATION / dataset / name / "metadata.json")
            if metadata["skipped"]:
                continue
            student, teacher = models[name], models[metadata["teacher"]]
            with torch.no_grad():
                faster = ratio(partial(student.predict, chips), partial(teacher.predict, chips), ROUNDS)
            operations = [cost.flops(partial(model.predict, chips[:1])) for model in (teacher, student)]
            results[f"{dataset} {name} against {metadata['teacher']}"] = {
                "faster": round(faster, 2),
                "smaller": round(_n_parameters(teacher) / _n_parameters(student), 1),
                "fewer_operations": round(operations[0] / operations[1], 1),
            }
    print(json.dumps(results, indent=1))


def _n_parameters(model: cost.BenchmarkedModel) -> int:
    return sum(tensor.numel() for module in model.modules for tensor in module.parameters())


if __name__ == "__main__":
    main()
