"""torchrun, but with the exit code of the processes that it ends with, and without a traceback: see torchrun.sh."""

from __future__ import annotations

import sys

from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from msn_dist.launch.processes import common_exit_code

if __name__ == "__main__":
    try:
        run(parse_args(sys.argv[1:]))
    except ChildFailedError as error:
        sys.exit(common_exit_code(error.failures))
    except SignalException as error:
        sys.exit(128 + error.sigval)
    except DistError as error:
        sys.exit(f"the nodes did not find each other: {str(error).splitlines()[0]}")
