"""RAFT's select_k as a function on CUDA tensors, from the library that benchmarks/airtopk/build.sh makes.

Its radix selections are AirTopK (Zhang et al., SC '23); AUTO is what RAFT itself picks for the shape, mostly its warp
selections, whose results are sorted.

Shape suffixes: M rows of a matrix, N its columns, K selected entries.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

DEFAULT_PATH = Path(__file__).parent / "airtopk" / "libairtopk.so"
AUTO, RADIX_8_BITS, RADIX_11_BITS = 0, 1, 2  # raft::matrix::SelectAlgo
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class AirTopK:
    """The loaded library.

    Raises:
        FileNotFoundError: it has not been built.
        OSError: it cannot be loaded.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise FileNotFoundError(f"no {path}: benchmarks/airtopk/build.sh says how to build it")
        self._library = ctypes.CDLL(str(path.resolve()))
        self._library.airtopk_error.restype = ctypes.c_char_p

    def select(self, scores_MN: Tensor, k: int, algorithm: int) -> tuple[Tensor, Tensor]:
        """The k largest of each row, best_MK and index_MK (int64), in no order; contiguous float32, float16, bfloat16.

        Raises RuntimeError with RAFT's message.
        """
        rows, columns = scores_MN.shape
        best_MK = scores_MN.new_empty(rows, k)
        index_MK = torch.empty(rows, k, dtype=torch.int32, device=scores_MN.device)
        failed = self._library.airtopk_select(
            ctypes.c_void_p(scores_MN.contiguous().data_ptr()),
            ctypes.c_int(_DTYPES[scores_MN.dtype]),
            ctypes.c_int64(rows),
            ctypes.c_int64(columns),
            ctypes.c_int(k),
            ctypes.c_void_p(best_MK.data_ptr()),
            ctypes.c_void_p(index_MK.data_ptr()),
            ctypes.c_int(algorithm),
            ctypes.c_void_p(torch.cuda.current_stream(scores_MN.device).cuda_stream),
        )
        if failed:
            raise RuntimeError(self._library.airtopk_error().decode(errors="replace"))
        return best_MK, index_MK.long()
