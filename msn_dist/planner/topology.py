"""The machines that a plan is for: nodes of equal ranks, and the links between them.

A rank is one device with its process: a GPU, or on a CPU a share of the cores.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, PositiveInt

from msn_dist.errors import InputError
from msn_dist.strict_yaml import Part, parse, read_yaml

Positive = Annotated[float, Field(gt=0.0, le=1e6, allow_inf_nan=False)]


class Link(Part):
    """What one rank can send over it in one direction, while it receives as much."""

    bandwidth_gb_s: Positive = Field(ge=1e-3, description="10^9 bytes a second of one rank")
    latency_us: Annotated[float, Field(ge=0.0, le=1e6, allow_inf_nan=False)] = Field(
        description="of one collective, whatever its size"
    )

    @property
    def bytes_per_second(self) -> float:
        return self.bandwidth_gb_s * 1e9

    @property
    def latency(self) -> float:
        """Seconds."""
        return self.latency_us * 1e-6


class Topology(Part):
    """`nodes` times `ranks_per_node` ranks."""

    name: str
    machine: str = Field(min_length=1, description="h200, h100, a100, or a file of `msn calibrate`")
    nodes: PositiveInt = 1
    ranks_per_node: PositiveInt
    device_gib: Positive = Field(description="memory that a rank may fill, of its GPU or of its share of the host")
    host_gib: Positive | None = Field(
        None, description="memory of its host that a GPU's rank may fill; null: no values are planned to lie there"
    )
    inside_node: Link | None = Field(None, description="between ranks of a node; null: as the profile has it")
    between_nodes: Link | None = Field(None, description="of one rank to other nodes; needed for more than one node")

    @property
    def world(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def device_bytes(self) -> int:
        return int(self.device_gib * 2**30)

    @property
    def host_bytes(self) -> int:
        return int((self.host_gib or 0) * 2**30)


def load_topology(path: str | Path) -> Topology:
    """Read a YAML file of configs/topology; InputError names every bad key."""
    topology = parse(Topology, read_yaml(Path(path)), str(path))
    if topology.nodes > 1 and topology.between_nodes is None:
        raise InputError(f"{path}: nodes={topology.nodes}, but between_nodes is missing; add its bandwidth and latency")
    return topology
