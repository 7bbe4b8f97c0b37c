"""Ranking models with a very large, row-sharded product-key memory (MSN, arXiv 2602.07526).

The public names below are imported when they are first used, so that the command line starts fast.
"""

import importlib as _importlib
import os as _os

# kernels/ and launch/ live at the top of the repository and are mapped into this package by
# setup.cfg; in a checkout, without an installation, this line does the same.
_root = _os.path.dirname(_os.path.dirname(_os.path.abspath(__file__)))
if _os.path.isfile(_os.path.join(_root, "setup.cfg")) and _os.path.isdir(_os.path.join(_root, "kernels")):
    __path__.append(_root)

_HOME = {
    "InputError": "msn_dist.errors",
    "MemoryConfig": "msn_dist.config",
    "RunConfig": "msn_dist.config",
    "load_config": "msn_dist.config",
    "Memory": "msn_dist.memory",
    "MemoryHealth": "msn_dist.memory",
    "MemoryValues": "msn_dist.memory",
    "MemoryValuesSharder": "msn_dist.sharding",
    "ValueOptimizer": "msn_dist.sharding",
    "make_plan": "msn_dist.planner",
    "Ranker": "msn_dist.models.ranker",
    "train": "msn_dist.training.run",
    "evaluate": "msn_dist.training.run",
}
__all__ = list(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
