"""One command per file, each a DVC stage or a tool: `python -m stages.<command>`."""

import os
import sys

if "EO_COMPOSE_WARM" in os.environ and sys.orig_argv[1:2] == ["-m"]:  # before a stage imports anything
    from stages import warm

    warm.hand_over()
