"""Choices for speed of the composition search's probe, on synthetic features of realistic size.

    python -m benchmarks.probes

- `one_thread`: speed of probing seven ensembles in parallel with one BLAS thread each, compared with sequential
  probing with all threads.
- `tolerance`: speed with our tolerance of the solver, compared with scikit-learn's default; `tolerance_costs` is the
  largest difference in validation accuracy over the seven ensembles.
- `biased_cka`, `cka`: of unrelated features, with the biased and with the unbiased estimate.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from threadpoolctl import threadpool_limits

from benchmarks.timing import ratio
from pipeline.composition import probes
from pipeline.composition.cka import linear_cka
from pipeline.composition.probes import Layer, Probe, ProbeSamples
from pipeline.composition.search import all_subsets
from pipeline.tasks import Classification

WIDTHS = {"a": 26, "b": 496, "c": 696}
N_TRAIN, N_VAL, N_CLASSES, ROUNDS = 506, 197, 5, 3
SKLEARN_TOLERANCE = 1e-4


def make_probe() -> Probe:
    """Make a probe of three backbones whose many correlated channels depend on five classes."""
    generator = np.random.default_rng(0)
    label = generator.integers(N_CLASSES, size=N_TRAIN + N_VAL)
    features = {}
    for name, width in WIDTHS.items():
        hidden = 0.8 * np.eye(N_CLASSES)[label] @ generator.normal(size=(N_CLASSES, 24))
        hidden += generator.normal(size=(len(label), 24))
        values = hidden @ generator.normal(size=(24, width)) + generator.normal(size=(len(label), width))
        features[Layer(name, "all")] = values.astype(np.float32)
    train, val = (
        ProbeSamples({layer: values[part] for layer, values in features.items()}, label[part])
        for part in (slice(N_TRAIN), slice(N_TRAIN, None))
    )
    return Probe(train, val, Classification(N_CLASSES), "logistic")


def main() -> None:
    probe = make_probe()
    ensembles = [[Layer(name, "all") for name in names] for names in all_subsets(list(WIDTHS))]

    def fit_parallel() -> list[float]:
        with threadpool_limits(1), ThreadPoolExecutor(os.cpu_count()) as pool:
            return [score for score, _ in pool.map(probe.fit, ensembles)]

    def fit_with_sklearn_tolerance() -> list[float]:
        tolerance, probes.TOLERANCE = probes.TOLERANCE, SKLEARN_TOLERANCE
        try:
            return fit_parallel()
        finally:
            probes.TOLERANCE = tolerance

    a, b = np.random.default_rng(1).normal(size=(2, N_TRAIN, 496))
    norms = [np.linalg.norm(first.T @ second) ** 2 for first, second in ((a, b), (a, a), (b, b))]
    scores = zip(fit_parallel(), fit_with_sklearn_tolerance(), strict=True)
    results = {
        "one_thread": ratio(fit_parallel, lambda: [probe.fit(layers) for layers in ensembles], ROUNDS),
        "tolerance": ratio(fit_parallel, fit_with_sklearn_tolerance, ROUNDS),
        "tolerance_costs": max(abs(score - exact) for score, exact in scores),
        "biased_cka": norms[0] / (norms[1] * norms[2]) ** 0.5,
        "cka": linear_cka(lambda: [{"a": a, "b": b}])[1][0, 1],
    }
    print(json.dumps({name: round(float(value), 3) for name, value in results.items()} | {"cores": os.cpu_count()}))


if __name__ == "__main__":
    main()
