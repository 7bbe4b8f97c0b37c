"""What a run starts from, if not from its seed: the best state of an earlier run."""

from __future__ import annotations

import shutil
from pathlib import Path

from torchrec.distributed.model_parallel import DistributedModelParallel

from msn_dist.config import RunConfig
from msn_dist.errors import InputError
from msn_dist.training.checkpoint import load_checkpoint, require_shapes, tensors_in
from msn_dist.training.growth import grow, grown_shapes
from msn_dist.training.optimizers import Optimizers
from msn_dist.training.ranks import Ranks
from msn_dist.training.run_directory import RunDirectory


class Origin:
    """The best state of the run at `path`, model and optimizers, for a run of `config`.

    World size and strategy may differ, and the new run may have more memory.sub_keys: then the memory grows on the way.
    Every method is a collective call.  InputError if there is no such state, if fewer sub-keys are asked for, or if the
    values have another optimizer, whose state would be missing.
    """

    def __init__(self, path: Path, config: RunConfig, ranks: Ranks) -> None:
        run = ranks.together(lambda: RunDirectory.open(path))
        self.path, self._ranks, self._seed = path.resolve(), ranks, config.seed
        self._checkpoint = ranks.together(run.existing_checkpoint)
        old = ranks.together(run.config)
        self._old, self._new = old.memory, config.memory
        self._grows = None not in (self._old, self._new) and self._old.sub_keys != self._new.sub_keys
        kinds = [one.optimizer.values.kind for one in (old, config) if one.memory is not None]
        if len(set(kinds)) > 1:
            raise InputError(
                f"optimizer.values.kind={kinds[1]}: {path} has the state of {kinds[0]}; "
                f"set optimizer.values.kind={kinds[0]}"
            )
        if self._grows and self._new.sub_keys < self._old.sub_keys:
            raise InputError(
                f"memory.sub_keys={self._new.sub_keys}: {path} has {self._old.sub_keys}, and a memory can only grow"
            )

    def require_fit(self, model: DistributedModelParallel) -> None:
        """InputError, which names what differs, if the state is not one of `model`."""
        shapes = {name: tensor.size for name, tensor in tensors_in(self._checkpoint, self._ranks).items()}
        if self._grows:
            shapes = grown_shapes(shapes, self._old, self._new.sub_keys)
        require_shapes(model, shapes, self._checkpoint, "only memory.sub_keys may be larger than there")

    def load(self, model: DistributedModelParallel, optimizers: Optimizers, run: RunDirectory) -> None:
        """Load the state; `run`, the new one, keeps a note of where it came from."""
        checkpoint = self._checkpoint
        if self._grows:
            checkpoint = run.path / "grown"
            grow(self._checkpoint, checkpoint, self._old, self._new.sub_keys, self._ranks, seed=self._seed)
        load_checkpoint(checkpoint, model, optimizers, self._ranks)
        if self._ranks.rank == 0:
            run.append({"kind": "init", "step": 0, "run": str(self.path)})
            if self._grows:
                shutil.rmtree(checkpoint)

    def __str__(self) -> str:
        """For the console."""
        text = f"starts from the best state of {self.path}"
        if self._grows:
            old, new = self._old, self._new
            text += f", its memory grown from {old.sub_keys} to {new.sub_keys} sub-keys"
            if new.top_k * old.sub_keys < old.top_k * new.sub_keys:
                enough = -(-old.top_k * new.sub_keys // old.sub_keys)
                text += (
                    f"\nnote: new slots start as copies of old ones, so top_k={new.top_k} finds fewer different ones; "
                    f"memory.top_k={enough} keeps closer to the metrics of before"
                )
        return text
