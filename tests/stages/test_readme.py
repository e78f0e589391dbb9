"""The README's Python code runs in a folder where the stages have run."""

import contextlib
import re
import runpy
import warnings
from unittest.mock import patch

from tests.conftest import ROOT

CHECKS = """
assert abs(2 * len(train) - int((tree.split == "train").sum())) <= 1
assert len(images.sample) == len(lazy.sample) == len(tree.sample)
assert fine.shape[-2:] == tree["level0"].features.shape[-2:]
assert batch["level2"].shape[1] == sum(store.array("level2/features").shape[0] for store in (raw, lite0))
assert next(iter(loader))["level2"].shape[0] == 16
assert rgb.shape[:2] == (2, 3)
assert (remote.read("level1/features", [0, 1]) == maps).all()
"""


def test_readme_notebook_section_runs(job, capsys):
    section = (ROOT / "README.md").read_text().split("## Features in a notebook")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 3
    with contextlib.chdir(job.folder), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        exec("\n".join(blocks) + CHECKS, {})
        arguments = re.search(r"`python -m cache.verify (\S+)`", section)[1]
        with patch("sys.argv", ["verify", arguments]), contextlib.suppress(SystemExit):
            runpy.run_module("cache.verify", run_name="__main__")
    assert "whole" in capsys.readouterr().out
