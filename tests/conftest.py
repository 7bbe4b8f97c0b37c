"""What every test may use."""

from __future__ import annotations

import multiprocessing
import os

import pytest
import torch

# Triton reads this when a kernel is defined, so it comes before any import of one.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Ranks of a test are forked from a process that has done the imports, and nothing else.
multiprocessing.set_forkserver_preload(["msn_dist.training.run"])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` run where there is one."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
