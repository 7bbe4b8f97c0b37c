"""YAML as configs, topologies and overrides hold it: whatever is wrong with it is one message."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from msn_dist.config import load_config
from msn_dist.errors import InputError
from msn_dist.planner.topology import load_topology
from msn_dist.strict_yaml import parse_text, read_yaml

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2024-13-45", "holds a value that cannot be (month must be in 1..12"),
        ("9" * 5000, "holds a value that cannot be (Exceeds the limit"),
        ("{[a]: 1}", "line 1, column 2 is not valid YAML (a key is no plain value)"),
        ("{{a: 1}: 1}", "line 1, column 2 is not valid YAML (a key is no plain value)"),
        ("{a: 1, a: 2}", "line 1, column 8 is not valid YAML (a stands twice)"),
        ("[" * 5000, "is nested too deep"),
        ("{a: ", "is not valid YAML"),
    ],
)
def test_what_cannot_be_read_is_told_with_its_place(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as refusal:
        parse_text(text, "here")
    assert str(refusal.value).startswith("here:") and message in str(refusal.value)
    (tmp_path / "file.yaml").write_text(f"key: {text}\n")
    with pytest.raises(InputError, match="file.yaml:"):
        read_yaml(tmp_path / "file.yaml")


@pytest.mark.parametrize(
    "override",
    [
        "model.width=8000000000",
        "model.layers=100000",
        "model.tokens=65536",
        "model.ffn_ratio=1e300",
        "model.embedding_dim=4611686018427387904",
        "memory.key_dim=4611686018427387904",
        "memory.heads=100000",
        "memory.chunks=65",
        "data.batch_size=4611686018427387904",
    ],
)
def test_sizes_that_no_device_can_have_are_refused(override: str) -> None:
    key, _, value = override.partition("=")
    section, _, name = key.partition(".")
    with pytest.raises(
        InputError, match=rf"demo.yaml: {section}\.{name}: input should be less than or equal to"
    ) as told:
        load_config(ROOT / "configs" / "demo.yaml", [override])
    assert value.removesuffix("00") in str(told.value).replace("+", "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: here\nzzz: 8", "zzz: unknown key; here may be name, machine, nodes"),
        ("name: here\nnode: 8", "node: unknown key; did you mean 'nodes'?"),
        ("", "expected a mapping of keys to values, found nothing"),
    ],
)
def test_what_may_stand_in_a_file_is_told_where_it_is_short(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "topology.yaml").write_text(text)
    with pytest.raises(InputError, match=re.escape(message)):
        load_topology(tmp_path / "topology.yaml")
