"""Fewer random assignments of blocks to splits: the default of 20,000 takes a second for each dataset."""

import pytest

from pipeline.data.sources.custom import samples


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr(samples, "MAX_DRAWS", samples.MIN_DRAWS)
