"""Peak resident memory of reading an epoch in random minibatches, for a store and for one of four times the samples.

    python -m benchmarks.memory

Each reading is a process of its own that imports only the cache. Both stores are larger than what a store may keep
mapped (a tenth of the machine's memory), or `mapped` is set so; a process that keeps every batch stands beside as
the control that must grow. Peaks are VmHWM, which begins anew with each process.
"""

import json
import os
import platform
import subprocess
import sys

READ = """
import sys
from cache.loader import Batches, shuffled
from cache.reader import Features

features = Features(sys.argv[1], mapped=int(sys.argv[3]) or None)
batches = Batches({level: [(features, f"{level}/features")] for level in features.levels})
kept = []
for index, batch in batches.stream(shuffled(batches.rows, 64, seed=0)):
    if sys.argv[2] == "kept":
        kept.append({name: values[:, :4].copy() for name, values in batch.items()})
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) / 1024)
"""
SMALL = 256 << 20


def peak(path: str, way: str, mapped: int) -> float:
    """Peak resident megabytes of a process that reads one epoch."""
    command = [sys.executable, "-c", READ, path, way, str(mapped)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    from benchmarks.features import repeated, store

    large = store("sample-trees", "lite0", 224, 8)
    stores = {
        "ours": (large, repeated(large, 4), 0),
        "mapped_256_mib": (store("sample-trees", "lite0", 224, 2), large, SMALL),
    }
    stores["kept"] = stores["mapped_256_mib"]
    peaks = {
        way: [peak(str(one.location), way, mapped) for one in (first, second)]
        for way, (first, second, mapped) in stores.items()
    }
    print(json.dumps({
        "machine": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}",
        "samples": {way: [len(first.sample), len(second.sample)] for way, (first, second, _) in stores.items()},
        "peak_megabytes": {way: [round(one) for one in pair] for way, pair in peaks.items()},
        "rss_growth": round(peaks["ours"][1] / peaks["ours"][0], 3),
        "rss_growth_mapped_256_mib": round(peaks["mapped_256_mib"][1] / peaks["mapped_256_mib"][0], 3),
        "rss_growth_kept": round(peaks["kept"][1] / peaks["kept"][0], 3),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
