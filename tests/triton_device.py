"""Where the tests of Triton kernels run: compiled on a GPU, else in the interpreter (see conftest)."""

from __future__ import annotations

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
