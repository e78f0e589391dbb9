"""Peak memory of reading an epoch in random minibatches, from a store and from one four times larger.

    python -m benchmarks.memory

Each epoch runs in a separate process that imports only the cache. Both stores are larger than what may stay mapped, a
tenth of the machine's memory. The control (`kept`) keeps a part of every batch, so its memory must grow. Peaks are
VmHWM, which starts at zero in each process.
"""

import subprocess
import sys

from benchmarks.features import feature_store, repeat_store
from benchmarks.timing import save_results

EPOCH = """
import sys
from cache.loader import FeatureDataset, shuffled_batches
from cache.reader import FeatureStore

features = FeatureStore(sys.argv[1])
dataset = FeatureDataset({level: [(features, f"{level}/features")] for level in features.levels})
copies = []
for index, batch in dataset.stream(shuffled_batches(dataset.rows, 64, seed=0)):
    if sys.argv[2] == "kept":
        copies.append({name: values[:, :4].copy() for name, values in batch.items()})
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) / 1024)
"""


def peak_megabytes(path: str, case: str) -> float:
    """Return the peak resident memory of a process that reads one epoch."""
    command = [sys.executable, "-c", EPOCH, path, case]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    large = feature_store("sample-trees", "lite0", 224, 8)
    stores = {
        "ours": (large, repeat_store(large, 4)),
        "kept": (feature_store("sample-trees", "lite0", 224, 2), large),
    }
    peaks = {case: [peak_megabytes(str(store.location), case) for store in pair] for case, pair in stores.items()}
    save_results(
        "memory",
        {
            "samples": {case: [len(small.sample), len(large.sample)] for case, (small, large) in stores.items()},
            "peak_megabytes": {case: [round(peak) for peak in pair] for case, pair in peaks.items()},
            "rss_growth": round(peaks["ours"][1] / peaks["ours"][0], 3),
            "rss_growth_kept": round(peaks["kept"][1] / peaks["kept"][0], 3),
        },
    )


if __name__ == "__main__":
    main()
