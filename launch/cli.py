"""The `msn` command. Heavy libraries are imported by the command that needs them.

Exit codes: 0 fine, 1 a failure inside (with a traceback) or a model that diverged (one message), 2 bad input, storage
that refuses or too little memory (one message), 3 a plan that does not fit (what would), 4 another rank was lost (what
each of the others knows of it), 130 interrupted.
"""

from __future__ import annotations

import errno
import importlib.metadata
import os
import signal
import sys
import threading
import traceback
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.text import Text

import msn_dist
from msn_dist.errors import Diverged, InputError, PeerLost
from msn_dist.launch.processes import PEER_LOST, choose_nproc, claim_failure, is_worker, launch
from msn_dist.training.quiet import quiet_libraries

_OF_THE_STORAGE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR)
CHECKOUT = Path(msn_dist.__file__).resolve().parent.parent

app = typer.Typer(
    help="Train ranking models with a very large, row-sharded product-key memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # main() below reports
)
prepare = typer.Typer(help="Write a data set as the Parquet folders that configs read.", no_args_is_help=True)
app.add_typer(prepare, name="prepare")


class Split(StrEnum):
    train = "train"
    valid = "valid"
    test = "test"


Target = Annotated[Path, typer.Argument(help="Folder to write; left alone if it is up to date.")]


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit; the one place where an error becomes a message."""
    quiet_libraries()
    threading.excepthook = _thread_failed
    if is_worker():
        # Python would wait for the current collective to end before it reacts to Ctrl-C.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        app(arguments, prog_name="msn")
    except SystemExit as stop:
        if stop.code == 130:
            _explain("interrupted")
        raise
    except InputError as error:
        _fail(2, str(error))
    except PeerLost as error:
        _fail(PEER_LOST, str(error))
    except Diverged as error:
        _fail(1, str(error))
    except OSError as error:
        if error.errno not in _OF_THE_STORAGE:
            _fail(1, traceback.format_exc())
        _fail(2, f"{error.filename or 'a file'}: cannot be read or written ({error.strerror})")
    except Exception as error:
        lacking = _memory_that_lacks(error)
        _fail(2 if lacking else 1, lacking or traceback.format_exc())


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    if version:
        typer.echo(f"msn_dist {importlib.metadata.version('msn_dist')}")
        raise typer.Exit


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file, see configs/.")],
    overrides: Annotated[list[str], typer.Argument(metavar="KEY=VALUE", help="For example training.epochs=2.")] = (),
    nproc: Annotated[int | None, typer.Option(help="Processes on this machine; default: one per GPU, or 1.")] = None,
    init: Annotated[
        Path | None, typer.Option(help="Earlier run to start from; memory.sub_keys may be larger than there.")
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="File of `msn plan`, which decides where tables lie.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory; default: a new one in the config's output.")] = None,
) -> None:
    """Train a model and keep everything about the run in its run directory.

    On several nodes, start it by torchrun: torchrun --nnodes 2 ... -m msn_dist.launch train CONFIG
    """
    from msn_dist.config import load_config
    from msn_dist.training.run_directory import new_run_path

    run = load_config(config, overrides)
    _refuse_beside_torchrun(nproc)
    if not is_worker():
        out = out or new_run_path(run)
        processes = choose_nproc(nproc, run.training.device)
        if processes > 1:
            command = ["-m", "msn_dist.launch", "train", str(config), *overrides, "--out", str(out)]
            command += ["--init", str(init)] if init is not None else []
            command += ["--plan", str(plan)] if plan is not None else []
            raise typer.Exit(launch(command, processes))
    # Ranks that do not share a parent cannot agree on a free name, so theirs is fixed.
    out = out or Path(run.output, run.name)

    from msn_dist.training import run as training

    training.train(run, out, init, plan)


@app.command("plan")
def make_plan(
    config: Annotated[Path, typer.Argument(help="YAML file, see configs/; its data may be no more than schema.yaml.")],
    overrides: Annotated[list[str], typer.Argument(metavar="KEY=VALUE", help="For example memory.sub_keys=4096.")] = (),
    topology: Annotated[Path, typer.Option(help="YAML file of the ranks, see configs/topology.")] = ...,
    zipf: Annotated[float | None, typer.Option(help="Exponent of the popularity of sub-keys on each axis.")] = None,
    usage: Annotated[Path | None, typer.Option(help="Finished run whose slots' use is to be expected.")] = None,
    rounding: Annotated[bool, typer.Option("--round", help="Also layouts of 16 and 8 bits; see docs/plan.md.")] = False,
    tune: Annotated[bool, typer.Option(help="Sweep slots, k, width, batch; show what nothing else beats.")] = False,
    max_gib: Annotated[float | None, typer.Option(help="Bound on what a rank may fill.")] = None,
    max_ms: Annotated[float | None, typer.Option(help="Bound on a step.")] = None,
    output: Annotated[Path | None, typer.Option(help="File for `msn train --plan`.")] = None,
) -> None:
    """Choose how tables lie on ranks, and say what it costs; nothing is built. Exit code 3 if nothing fits."""
    if is_worker():
        raise InputError("a plan is made by one process, and torchrun has started several; run msn plan by itself")
    from msn_dist.launch import planning

    limits = {"most_gib": max_gib, "most_ms": max_ms}
    popularity = {"zipf": zipf, "usage": usage}
    raise typer.Exit(
        planning.plan(config, overrides, topology, rounding=rounding, tune=tune, output=output, **limits, **popularity)
    )


@app.command()
def calibrate(
    nproc: Annotated[int | None, typer.Option(help="Processes on this machine; default: one per GPU, or 1.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    output: Annotated[Path, typer.Option(help="File of the profile.")] = Path("machine.json"),
) -> None:
    """Measure what this machine can do, for `msn plan`; takes one or two minutes.

    On several nodes, start it by launch/torchrun.sh, as a run.
    """
    from msn_dist.launch import planning

    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device {device}: is none of auto, cpu, cuda")
    if not is_worker():
        processes = choose_nproc(nproc, device)
        if processes > 1:
            command = ["-m", "msn_dist.launch", "calibrate", "--device", device, "--output", str(output)]
            raise typer.Exit(launch(command, processes))
    planning.calibrate(output, device)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    overrides: Annotated[
        list[str], typer.Argument(metavar="KEY=VALUE", help="Where and how it runs, for example training.device=cpu.")
    ] = (),
    split: Annotated[Split, typer.Option(help="Rows to evaluate on.")] = "test",
    nproc: Annotated[int | None, typer.Option(help="Processes on this machine; default: one per GPU, or 1.")] = None,
) -> None:
    """Print the metrics of a trained model.

    On several nodes, start it by torchrun: torchrun --nnodes 2 ... -m msn_dist.launch evaluate RUN
    """
    from msn_dist.training.run_directory import RunDirectory

    device = RunDirectory.open(run).config(overrides).training.device
    _refuse_beside_torchrun(nproc)
    if not is_worker() and (processes := choose_nproc(nproc, device)) > 1:
        command = ["-m", "msn_dist.launch", "evaluate", str(run), *overrides, "--split", Split(split).value]
        raise typer.Exit(launch(command, processes))

    from msn_dist.training import run as training

    training.evaluate(run, Split(split).value, overrides)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="Run directory.")]) -> None:
    """Write RUN/report.html again."""
    from msn_dist.training.report import write_report

    typer.echo(write_report(run))


@app.command()
def doctor() -> None:
    """Show versions, whether they match, what this machine can run, and how to repair what is wrong."""
    from msn_dist.launch.doctor import examine

    raise typer.Exit(examine())


@prepare.command()
def kuairand(
    target: Target = Path(".cache/kuairand"),
    source: Annotated[Path, typer.Option(help="Folder with the raw files.")] = CHECKOUT / "data" / "kuairand",
) -> None:
    """KuaiRand impressions, which come with this repository, with causal features."""
    from msn_dist.data import kuairand

    kuairand.prepare(source, target)
    typer.echo(f"{target} is ready")


@prepare.command()
def synthetic(
    target: Target = Path(".cache/synthetic"),
    rows: Annotated[int, typer.Option(min=10, help="Training rows; valid and test get a tenth each.")] = 500_000,
    users: Annotated[int, typer.Option(help="Number of users.")] = 20_000,
    items: Annotated[int, typer.Option(help="Number of items.")] = 10_000,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Invented impressions with Zipf ids and a structure that only a personalised memory can fit."""
    from msn_dist.data import synthetic

    synthetic.prepare(target, rows=rows, users=users, items=items, seed=seed)
    typer.echo(f"{target} is ready")


@prepare.command()
def criteo(
    sources: Annotated[list[Path], typer.Argument(help="Tab-separated files, unpacked, in time order.")],
    target: Annotated[Path, typer.Option(help="Folder to write; left alone if it is up to date.")] = Path(
        ".cache/criteo"
    ),
    hash_rows: Annotated[int, typer.Option(help="Rows of every category's table.")] = 100_000,
    min_count: Annotated[
        int | None, typer.Option(help="Vocabularies of values seen so often, instead of hashing.")
    ] = None,
) -> None:
    """Criteo click logs: 40 columns, split in time order into 80 % train, 10 % valid and 10 % test."""
    from msn_dist.data import criteo

    criteo.prepare(sources, target, hash_rows=hash_rows, min_count=min_count)
    typer.echo(f"{target} is ready")


def _refuse_beside_torchrun(nproc: int | None) -> None:
    if is_worker() and nproc is not None:
        raise InputError(f"--nproc {nproc}: torchrun has started {os.environ['WORLD_SIZE']} processes; leave it out")


def _memory_that_lacks(error: Exception) -> str | None:
    """What to tell if a device or the host has run out of memory, else None."""
    if type(error).__name__ != "OutOfMemoryError" and "DefaultCPUAllocator" not in str(error):  # torch is not imported
        return None
    said = str(error).rpartition("DefaultCPUAllocator: ")[2]
    return (
        f"rank {os.environ.get('RANK', '0')} ran out of memory: {said}\n"
        "`msn plan CONFIG --topology FILE` says what each rank takes and which changes would fit"
    )


def _fail(code: int, explanation: str) -> NoReturn:
    first = claim_failure(code)
    if first is None:
        _explain(explanation)
    distributed = sys.modules.get("torch.distributed")
    if is_worker() or (distributed and distributed.is_initialized()):
        # A process group and a model that are still alive would turn a normal exit into an abort.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if first is None else first)
    sys.exit(code)


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    """PeerLost may come from a thread, as the main one may be waiting for that peer."""
    if issubclass(failure.exc_type, PeerLost):
        _fail(PEER_LOST, str(failure.exc_value))
    threading.__excepthook__(failure)


def _explain(message: str) -> None:
    Console(stderr=True, soft_wrap=True, highlight=False).print(Text(message.rstrip(), style="red"))
