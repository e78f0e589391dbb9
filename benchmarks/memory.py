"""Peak resident memory of reading an epoch in random minibatches, for a store and for one of four times the samples.

    python -m benchmarks.memory

Each reading is a process of its own that imports only the cache. The memory map stands beside as the way whose
resident memory does grow with what it touches.
"""

import json
import os
import platform
import subprocess
import sys

READ = """
import resource, sys
import numpy as np
from cache.batches import Batches, shuffled
from cache.read import Features

features = Features(sys.argv[1])
if sys.argv[2] == "ours":
    batches = Batches({level: [(features, f"{level}/features")] for level in features.levels})
    for _ in batches.stream(shuffled(batches.rows, 64, seed=0)):
        pass
else:
    for level in features.levels:
        folder = features.location / level / "features"
        maps = [np.memmap(path, "uint8", "r") for path in sorted(folder.glob("c.*"))]
        for one in maps:
            one.sum()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def peak(path: str, way: str) -> float:
    """Peak resident megabytes of a process that reads one epoch."""
    ended = subprocess.run([sys.executable, "-c", READ, path, way], capture_output=True, text=True, check=True)
    return float(ended.stdout)


def main() -> None:
    from benchmarks.features import store

    small, large = (store("sample-trees", "lite0", 224, copies) for copies in (2, 8))
    peaks = {way: [peak(str(one.location), way) for one in (small, large)] for way in ("ours", "memmap")}
    print(json.dumps({
        "machine": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}",
        "samples": [len(small.sample), len(large.sample)],
        "peak_megabytes": {way: [round(one) for one in pair] for way, pair in peaks.items()},
        "rss_growth": round(peaks["ours"][1] / peaks["ours"][0], 3),
        "memmap_rss_growth": round(peaks["memmap"][1] / peaks["memmap"][0], 3),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
