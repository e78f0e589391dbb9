"""Loaded before all else: a share of the processor for each of pytest-xdist's processes and what they start.

Threads of torch and BLAS wait for one another by spinning: two processes with a thread a core each hold one another
up. A test that is about threads says how many it wants.
"""

import os

if processes := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # not in the process that only hands out tests
    share = len(os.sched_getaffinity(0)) // int(processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))
