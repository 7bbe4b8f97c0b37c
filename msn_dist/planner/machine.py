"""What one rank's device can do: the rates that a step's time is made of.

Profiles come from `msn calibrate`, or are built in (msn_dist/planner/machines), where every line says whether it was
measured or taken from a data sheet.
"""

from __future__ import annotations

import bisect
import math
import platform
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, Field, PositiveInt, model_validator

from msn_dist.errors import InputError
from msn_dist.strict_yaml import Part, parse, read_yaml

SINGLE = ("single_read", "single_row_read", "single_update", "single_row_update")
# time of FBGEMM's TBE over that of our kernels, which profiles of GPUs are of, to read and to update: medians of
# benchmarks.kernels on an H200, which has 1.2 to 2.4 and 1.1 to 2.6
_TBE = 1.7, 1.9


def _ascending(points: list[list[float]]) -> list[list[float]]:
    if not points or any(len(point) != 2 or not all(0 < number < math.inf for number in point) for point in points):
        raise ValueError("points are pairs of positive numbers, one at least")
    if any(first[0] >= second[0] for first, second in zip(points, points[1:], strict=False)):
        raise ValueError("points must ascend in their first number")
    return points


def _between(points: list[list[float]], x: float) -> float:
    """y at x, straight between the points [x, y] on logarithmic axes; constant beyond them."""
    place = bisect.bisect([first for first, _ in points], x)
    if place in (0, len(points)):
        return points[min(place, len(points) - 1)][1]
    (x0, y0), (x1, y1) = points[place - 1 : place + 1]
    return y0 * (y1 / y0) ** (math.log(x / x0) / math.log(x1 / x0))


class Curve(Part):
    """A rate over a size: straight between its points on logarithmic axes."""

    points: Annotated[list[list[float]], AfterValidator(_ascending)] = Field(description="[size, rate], ascending")
    source: Literal["measured", "datasheet", "estimated"]
    note: str = ""

    def at(self, size: float) -> float:
        """The rate, in units a second, of an operation of this size; constant beyond the points."""
        return _between(self.points, size)

    def of_work(self, size: float) -> float:
        """The same where the work grows with the size: beyond the last point the rate falls in proportion."""
        return self.at(size) / max(1.0, size / self.points[-1][0])


class Latency(Part):
    """Seconds that something takes however small it is."""

    seconds: Annotated[float, Field(ge=0.0)]
    source: Literal["measured", "datasheet", "estimated"]
    note: str = ""


class Dispatch(Part):
    """Seconds of a training step on the host of a GPU, which works behind it."""

    operator: Annotated[float, Field(ge=0.0)] = Field(description="an operator of the dense network, as traces count")
    memory: Annotated[float, Field(ge=0.0)] = Field(description="a memory, beside its operators: kernels and exchange")
    step: Annotated[float, Field(ge=0.0)] = Field(description="TorchRec's modules, data-parallel wrapper, optimizers")
    source: Literal["measured", "datasheet", "estimated"]
    note: str = ""


class Collective(Part):
    """Seconds of one collective: as measured at `points`, else latency + bytes that a rank sends / bandwidth."""

    latency: Annotated[float, Field(ge=0.0, description="seconds")]
    bandwidth: Annotated[float, Field(gt=0.0, description="bytes a second that a rank sends")]
    source: Literal["measured", "datasheet", "estimated"]
    points: list[list[float]] = Field([], description="[bytes that a rank sends, seconds], as measured, ascending")
    note: str = ""

    def seconds(self, size: float) -> float:
        """Of one that sends `size` bytes from a rank: beyond the points the smallest's time and the largest's rate."""
        if not self.points:
            return self.latency + size / self.bandwidth
        (least, _), (most, _) = self.points[0], self.points[-1]
        return _between(self.points, min(max(size, least), most)) * max(1.0, size / most)

    @model_validator(mode="after")
    def _ascends(self) -> Collective:
        if self.points:
            _ascending(self.points)
        return self


class Machine(Part):
    """One rank's device while `ranks` of them work at once; sizes and rates in bytes, numbers and seconds."""

    name: str = Field(description="of the device")
    kind: Literal["cuda", "cpu"]
    ranks: PositiveInt = Field(description="that worked on one machine at once when it was measured")
    date: str
    versions: dict[str, str | None]
    copy_rate: Curve = Field(description="bytes of an element-wise operator, read and written -> bytes/s")
    function_rate: Curve = Field(description="elements of a GELU, tanh or LayerNorm -> elements/s")
    matrix_fp32: Curve = Field(description="operations of one matrix product -> operations/s")
    matrix_bf16: Curve = Field(description="the same with operands of 16 bits")
    top_k: Curve = Field(description="row length, torch.topk of 32 -> numbers looked at a second")
    sort: Curve = Field(description="numbers -> numbers sorted a second")
    retrieve: Curve | None = Field(None, description="fused kernel: sub-keys of an axis -> queries/s, k = 32, d_k = 64")
    retrieve_backward: Curve | None = Field(None, description="the same of its backward")
    retrieve_fp32: Curve | None = Field(None, description="the same forward, of float32 operands")
    layer_norm: Curve | None = Field(None, description="row width -> numbers/s; else as other operators")
    layer_norm_backward: Curve | None = Field(None, description="the same of its backward")
    index_select: Curve | None = Field(None, description="row width -> numbers/s, fp32; else as other operators")
    index_add: Curve | None = Field(None, description="the same, of any dtype")
    hit_read: Curve = Field(description="bytes of a row -> hits/s of weighted sums, of 32 hits on few rows each")
    row_read: Curve = Field(description="bytes of a row -> distinct rows/s, beside their hits")
    hit_update: Curve = Field(description="bytes of a row -> hits/s of the backward with row-wise Adagrad")
    row_update: Curve = Field(description="bytes of a row -> distinct rows/s, beside their hits")
    single_read: Curve | None = Field(None, description="these of hits in a bag each, without weights; else as above")
    single_row_read: Curve | None = None
    single_update: Curve | None = None
    single_row_update: Curve | None = None
    bucketing: Curve = Field(description="ranks -> hits/s, sorted by owner")
    asked: Curve | None = Field(None, description="hits -> hits/s of finding the distinct rows to ask for; else `sort`")
    operator: Latency = Field(description="of one operator on the device")
    dispatch: Dispatch | None = Field(None, description="of GPUs")
    id_step: Latency | None = Field(None, description="of CPUs: TorchRec's modules in one step, beside look-ups")
    host_link: Curve = Field(description="bytes of a copy from the host -> bytes/s")
    straggling: Curve | None = Field(
        None,
        description="seconds that ranks compute between two collectives -> share of it that they wait for the slowest",
    )
    all_to_all: Collective
    all_reduce: Collective

    @model_validator(mode="after")
    def _possible(self) -> Machine:
        if (self.retrieve is None) != (self.retrieve_backward is None):
            raise ValueError("retrieve and retrieve_backward belong together; measure again, or leave both out")
        if len({getattr(self, name) is None for name in SINGLE}) == 2:
            raise ValueError(f"{', '.join(SINGLE)} belong together; measure again, or leave all of them out")
        if self.kind == "cuda" and (self.dispatch is None or self.id_step is not None):
            raise ValueError("a GPU's profile has dispatch, what its host takes, and no id_step; measure again")
        return self

    @property
    def tbe(self) -> tuple[float, float]:
        """Times of FBGEMM's TBE over those of `read_seconds` and `update_seconds`."""
        return _TBE if self.kind == "cuda" else (1.0, 1.0)

    def pass_seconds(self, size: float) -> float:
        """An element-wise pass over so many bytes, read and written."""
        return max(self.operator.seconds, size / self.copy_rate.at(size))

    def read_seconds(self, hits: float, rows: float, row_bytes: float, single: bool = False) -> float:
        """A look-up of so many hits that fall on so many rows; `single`: without weights, in a bag each."""
        of_hits, of_rows = self.hit_read, self.row_read
        if single and self.single_read is not None:
            of_hits, of_rows = self.single_read, self.single_row_read
        return hits / of_hits.of_work(row_bytes) + rows / of_rows.of_work(row_bytes)

    def update_seconds(self, hits: float, rows: float, row_bytes: float, single: bool = False) -> float:
        """Its backward, with the step of the rows."""
        of_hits, of_rows = self.hit_update, self.row_update
        if single and self.single_update is not None:
            of_hits, of_rows = self.single_update, self.single_row_update
        return hits / of_hits.of_work(row_bytes) + rows / of_rows.of_work(row_bytes)


def device_name(device: torch.device) -> str:
    """As people call it: that of the GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0]} ({len(names)} cores)" if names else platform.machine()


BUILT_IN = ("h200", "h100", "a100")


def load_machine(name: str, near: Path | None = None) -> Machine:
    """A built-in profile, or the file of one; a relative path may also be meant from the folder `near`."""
    if name in BUILT_IN:
        with resources.as_file(resources.files("msn_dist.planner") / "machines" / f"{name}.yaml") as path:
            return parse(Machine, read_yaml(path), f"profile {name}")
    path = Path(name)
    if near is not None and not path.is_absolute() and not path.exists():
        path = near / path
    if not path.is_file():
        raise InputError(
            f"machine: {name}, as the topology says, is no built-in profile ({', '.join(BUILT_IN)}) and no file; "
            f"`msn calibrate --nproc RANKS --output {name}` writes one of this machine"
        )
    tree = read_yaml(path)
    if "copy_rate" not in tree:
        raise InputError(f"{path}: is no profile of a machine; `msn calibrate` writes one")
    again = f"`msn calibrate --nproc {tree.get('ranks', 'RANKS')} --output {path}` writes it anew"
    if isinstance(dispatch := tree.get("dispatch"), dict) and "seconds" in dispatch:
        raise InputError(f"{path}: is a profile of an earlier version; {again}")
    try:
        return parse(Machine, tree, str(path))
    except InputError as error:
        raise InputError(f"{error}; {again}") from None
