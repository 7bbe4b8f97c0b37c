"""Ranking models with a very large, row-sharded product-key memory (MSN, arXiv 2602.07526)."""

import os as _os

# kernels/ and launch/ live at the top of the repository and are mapped into this package by
# setup.cfg; in a checkout, without an installation, this line does the same.
_root = _os.path.dirname(_os.path.dirname(_os.path.abspath(__file__)))
if _os.path.isfile(_os.path.join(_root, "setup.cfg")) and _os.path.isdir(_os.path.join(_root, "kernels")):
    __path__.append(_root)
