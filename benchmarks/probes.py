"""The quick probe of the composition search on made features of the sample sets' size: its choices for speed.

    python -m benchmarks.probes

`one_thread`: seven ensembles probed a core each, BLAS with one thread, against one after the other on all cores.
`tolerance`: the solver's tolerance against scikit-learn's own, in time; `tolerance_costs`: the largest difference in
validation accuracy over the seven. `biased_cka`, `cka`: of unrelated features, with and without the estimate's bias.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from threadpoolctl import threadpool_limits

from benchmarks.timing import ratio
from pipeline.composition.cka import linear_cka
from pipeline.composition.probes import Probe, ProbeSamples
from pipeline.composition.search import all_subsets
from pipeline.tasks import Classification
from pipeline.heads import probes

WIDTHS = {"a": 26, "b": 496, "c": 696}
TRAIN, VAL, CLASSES, ROUNDS = 506, 197, 5, 3


def probe() -> Probe:
    """Three backbones that know something of five classes, in many correlated channels."""
    generator = np.random.default_rng(0)
    label = generator.integers(CLASSES, size=TRAIN + VAL)
    features = {}
    for name, width in WIDTHS.items():
        hidden = 0.8 * np.eye(CLASSES)[label] @ generator.normal(size=(CLASSES, 24))
        hidden += generator.normal(size=(len(label), 24))
        values = hidden @ generator.normal(size=(24, width)) + generator.normal(size=(len(label), width))
        features[name, "all"] = values.astype(np.float32)
    train, val = (
        ProbeSamples({layer: values[part] for layer, values in features.items()}, label[part])
        for part in (slice(TRAIN), slice(TRAIN, None))
    )
    return Probe(train, val, Classification(CLASSES), "logistic")


def main() -> None:
    made = probe()
    wanted = [[(name, "all") for name in names] for names in all_subsets(list(WIDTHS))]

    def ours() -> list[float]:
        with threadpool_limits(1), ThreadPoolExecutor(os.cpu_count()) as pool:
            return [score for score, _ in pool.map(made.fit, wanted)]

    def exact() -> list[float]:
        kept, probes._TOLERANCE = probes._TOLERANCE, 1e-4
        try:
            return ours()
        finally:
            probes._TOLERANCE = kept

    one, other = np.random.default_rng(1).normal(size=(2, TRAIN, 496))
    norms = [np.linalg.norm(a.T @ b) ** 2 for a, b in ((one, other), (one, one), (other, other))]
    told = {
        "one_thread": ratio(ours, lambda: [made.fit(layers) for layers in wanted], ROUNDS),
        "tolerance": ratio(ours, exact, ROUNDS),
        "tolerance_costs": max(abs(a - b) for a, b in zip(ours(), exact(), strict=True)),
        "biased_cka": norms[0] / (norms[1] * norms[2]) ** 0.5,
        "cka": linear_cka(lambda: [{"one": one, "other": other}])[1][0, 1],
    }
    print(json.dumps({name: round(float(value), 3) for name, value in told.items()} | {"cores": os.cpu_count()}))


if __name__ == "__main__":
    main()
