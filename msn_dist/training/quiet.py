"""Silence for library messages that tell a user nothing, and for those only."""

from __future__ import annotations

import logging
import warnings


def quiet_libraries() -> None:
    """Drop known noise of torch, torchrec and fbgemm. Call before torchrec is imported.

    UserWarnings stay: "autograd kernel was not registered", which means a lost gradient, is one of them.
    """
    # Deprecated names that torchrec calls in torch.distributed, and DDP's broadcast_buffers.
    warnings.filterwarnings("ignore", "TBE B200 optimization", UserWarning)  # fbgemm tells of a feature
    # torchrec 1.6 on torch 2.11, whenever it makes a ShardingEnv
    warnings.filterwarnings("ignore", "`_get_pg_default_device` will be deprecated|Multiple backends are", UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torchrec\..*|torch\.distributed\..*")
    warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)  # a run says it itself, once
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)  # "is_fx_tracing will return true"
    # the traceback of tensors too large to count, which the planner tells in a line; torch sets the level itself
    logging.getLogger("torch._subclasses.fake_tensor").addFilter(_is_no_noise)
    # "will NOT be pipelined": memory slots are born in the forward, so it is so on purpose.
    logging.getLogger("torchrec.distributed.train_pipeline.utils").setLevel(logging.ERROR)
    logging.getLogger().addFilter(_is_no_noise)  # fbgemm logs this one through the root logger itself


def _is_no_noise(record: logging.LogRecord) -> bool:
    said = record.getMessage()
    return "_fbgemm_torch_compat_table has no entry" not in said and "failed while attempting to run meta" not in said
