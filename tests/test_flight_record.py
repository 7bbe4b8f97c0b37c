"""A lost peer: every other rank ends in time and says which exchange failed, what it carried and who is missing."""

from __future__ import annotations

import importlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from msn_dist.errors import PeerLost
from msn_dist.launch.cli import main
from msn_dist.launch.processes import PEER_LOST, common_exit_code
from msn_dist.sharding import flight_record
from msn_dist.sharding.flight_record import FlightRecord

ROOT = Path(__file__).parent.parent
WORLD = 3
RESET = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:53672. "
    "This is typically caused by a remote worker crashing. Check the logs"
)
MISMATCH = "[enforce fail at /pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:456] op.preamble.length <= op.nbytes"


class Clock:
    """Stands still, but for what a record sleeps and a test lets pass."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr(flight_record, "time", Clock())
    return flight_record.time


def records(world: int, timeout: float | None = 30) -> list[FlightRecord]:
    store = dist.HashStore()
    return [FlightRecord(rank, list(range(world)), store, timeout) for rank in range(world)]


def exchange(record: FlightRecord, name: str, arrives: bool = True) -> None:
    sequence = record.departed(name, range(10, 10 + len(record.ranks)), range(20, 20 + len(record.ranks)))
    if arrives:
        record.arrived(sequence)


def test_a_record_names_the_exchange_the_bytes_and_the_rank_that_did_not_come(clock: Clock) -> None:
    first, second, _ = records(3)
    for record in (first, second):
        exchange(record, "forward hits of layer1")
        exchange(record, "forward values of layer1", arrives=False)
    clock.sleep(7)
    assert "rank 1 lost" in str(second.lost(RuntimeError(RESET)))
    assert str(first.lost(RuntimeError(RESET))).splitlines() == [
        "rank 0 lost a peer in exchange 2 (forward values of layer1), 10.0 s after its start (timeout 30 s)",
        "  reason: Connection closed by peer [127.0.0.1]:53672",
        "  missing: rank 2 is gone, or did not come to exchange 2",
        "  bytes sent: 11 to rank 1, 12 to rank 2; expected: 21 from rank 1, 22 from rank 2",
        "  arrived: 1 (forward hits of layer1)",
    ]


def test_a_rank_that_failed_in_an_earlier_exchange_is_named_as_behind() -> None:
    first, second = records(2)
    exchange(second, "forward counts", arrives=False)
    second.lost(RuntimeError(RESET))
    exchange(first, "forward counts")
    exchange(first, "forward hits", arrives=False)
    message = str(first.lost(RuntimeError(RESET)))
    assert "missing: nobody" in message
    assert "behind: rank 1 failed in exchange 1 (forward counts)" in message


def test_if_all_came_the_last_one_is_named(clock: Clock) -> None:
    first, second = records(2)
    exchange(first, "forward hits", arrives=False)
    clock.sleep(30)
    first.lost(RuntimeError(RESET))
    exchange(second, "forward hits", arrives=False)
    assert "missing: nobody; rank 1 came last and waited 0.0 s" in str(second.lost(RuntimeError(RESET)))


def test_a_failure_of_another_collective_names_the_last_exchange(clock: Clock) -> None:
    record, _ = records(2, timeout=None)
    assert "lost a peer in another collective, 0.0 s after joining, before its first exchange\n" in str(
        record.lost(RuntimeError(RESET))
    )
    record, _ = records(2)
    gave_up = RuntimeError("Application timeout caused pair closure")  # gloo, where another thread was the first to
    assert "lost a peer in another collective" in str(record.lost(gave_up))
    record, _ = records(2)
    exchange(record, "backward values")
    clock.sleep(1.5)
    message = str(record.lost(dist.DistBackendError("NCCL error in ProcessGroupNCCL.cpp: remote process exited")))
    assert "in another collective, 1.5 s after exchange 1 (backward values) had arrived (timeout 30 s)\n" in message
    assert "missing: rank 1 is gone, or did not come to this collective" in message


@pytest.mark.parametrize(
    "bug",
    [
        RuntimeError("Split sizes doesn't match total dim 0 size"),
        RuntimeError(MISMATCH),
        dist.DistBackendError("NCCL error: ncclInvalidUsage: Duplicate GPU detected"),
        KeyError("boom"),
    ],
)
def test_a_bug_stays_what_it_is_and_the_others_hear_of_it_without_waiting(bug: Exception, clock: Clock) -> None:
    first, second = records(2)
    with pytest.raises(type(bug)) as raised:
        second.lost(bug)
    assert raised.value is bug
    began = clock.now
    message = str(first.lost(RuntimeError(RESET)))
    assert f"missing: rank 1 ended by its own error, {type(bug).__name__}: {bug}" in message
    assert clock.now == began


def test_a_peer_lost_is_not_told_again() -> None:
    error = PeerLost("told")
    with pytest.raises(PeerLost, match="^told$"):
        records(2)[0].lost(error)


def test_a_large_world_is_summed_up() -> None:
    world = records(20)
    for record in world:
        exchange(record, "forward hits", arrives=False)
    for record in [*world[1:8], *world[16:]]:
        record._ask(record._standing()[1], [])
    message = str(world[0].lost(RuntimeError(RESET)))
    assert "missing: ranks 8-15 are gone, or did not come to exchange 1" in message
    assert (
        f"bytes sent: {sum(range(11, 30))} to 19 ranks, of these 18 to rank 8, 19 to rank 9, 20 to rank 10, "
        f"21 to rank 11 and 4 more; expected: {sum(range(21, 40))} from 19 ranks"
    ) in message


def test_messages_that_travel_at_once_are_told_oldest_first() -> None:
    record, _ = records(2)
    numbers = [record.departed(f"chunk {chunk}", [0, 1], [0, 1]) for chunk in range(40)]
    record.arrived(numbers[0])  # forgotten by now
    for number in numbers[-6:]:
        if number not in (37, 39):
            record.arrived(number)
    for number in numbers[1:-6]:
        record.arrived(number)
    message = str(record.lost(RuntimeError(RESET)))
    assert "in exchange 37 (chunk 36)" in message
    assert "arrived: 36 (chunk 35), 38 (chunk 37), 40 (chunk 39)\n  also in flight: 39 (chunk 38)" in message


def test_an_exchange_that_the_host_does_not_wait_for_is_in_flight_until_it_is_complete(clock: Clock) -> None:
    record, _ = records(2, timeout=30)
    complete = []
    record.arrived(record.departed("forward hits", [0, 1], [0, 1]), completed=lambda: bool(complete))
    clock.sleep(15)
    assert not record.is_overdue()
    clock.sleep(7)
    assert record.is_overdue()
    assert record.idle() == 22
    complete.append(True)
    assert not record.is_overdue()
    assert "22.0 s after exchange 1 (forward hits) had arrived" in str(record.account("told to"))


def test_a_store_that_hangs_does_not_hide_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopped:
        def add(self, key: str, amount: int) -> int:
            threading.Event().wait()

        def set(self, key: str, value: str) -> None:
            raise AssertionError("add has not returned")

    monkeypatch.setattr(flight_record, "GRACE", 0.01)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "node7")
    record = FlightRecord(1, [0, 1], Stopped())
    exchange(record, "forward hits", arrives=False)
    message = str(record.lost(RuntimeError(RESET)))
    assert "rank 1 lost a peer in exchange 1 (forward hits)" in message
    assert "the rendezvous store does not answer; torchrun on node7 holds it" in message


def test_a_rank_that_is_killed_is_named_by_the_others_although_the_agent_ends_them() -> None:
    result = subprocess.run(
        [sys.executable, "tests/lost_peer.py", "killed", "1"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1
    *told, last = result.stderr.splitlines()
    assert last == "rank 1 was ended by SIGKILL; is the machine out of memory?"
    assert speakers(told) == [0, 2], result.stderr
    assert told.count("  missing: rank 1 is gone, or did not come to exchange 5") == 2
    assert "  bytes sent: 160 to rank 1, 160 to rank 2; expected: 160 from rank 1, 160 from rank 2" in told


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        ({0: (PEER_LOST, 9), 1: (PEER_LOST, 10), 2: (-signal.SIGTERM, 10)}, PEER_LOST),
        ({0: (PEER_LOST, 9), 1: (-signal.SIGKILL, 39), 2: (128 + signal.SIGTERM, 10)}, PEER_LOST),
        ({0: (PEER_LOST, 12), 1: (-signal.SIGKILL, 9)}, 1),
        ({0: (PEER_LOST, 9), 1: (1, 10)}, 1),
        ({0: (1, 9), 1: (2, 10), 2: (PEER_LOST, 10)}, 2),
    ],
)
def test_one_exit_code_for_a_launch(ends: dict[int, tuple[int, int]], code: int) -> None:
    failures = {rank: SimpleNamespace(exitcode=end, timestamp=time) for rank, (end, time) in ends.items()}
    assert common_exit_code(failures) == code


NO_STORE = "unknown, as the rendezvous store does not answer; rank 0 holds it and is most likely gone itself"


@pytest.mark.parametrize(
    ("how", "victim", "missing"),
    [
        ("stopped", 1, "rank 1 is gone, or did not come to exchange 5"),
        ("killed", 0, NO_STORE),
        ("told", 0, NO_STORE),
    ],
    ids=["stopped", "killed with the store", "told to end and stuck"],
)
def test_without_an_agent_the_others_end_by_themselves(how: str, victim: int, missing: str, tmp_path: Path) -> None:
    others = [rank for rank in range(WORLD) if rank != victim]
    exit_codes, output = run_without_agent(tmp_path, how, victim)
    assert exit_codes == [PEER_LOST, PEER_LOST], output
    assert speakers(output) == others, output
    assert output.count(f"  missing: {missing}") == 2, output
    if how == "told":
        assert output.count("  reason: nothing has happened in the 5 s since SIGTERM") == 2, output


def test_a_crash_is_told_once_and_those_who_lost_their_peer_by_it_are_silent(tmp_path: Path) -> None:
    exit_codes, output = run_without_agent(tmp_path, "crash", victim=1)
    assert exit_codes == [1, 1], output
    assert output[0].startswith("Traceback")
    assert output[-1] == "KeyError: 'boom'"


def run_without_agent(folder: Path, how: str, victim: int) -> tuple[list[int | None], list[str]]:
    """(exit codes of all ranks but the victim, lines that all printed), the store being held by rank 0."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    context = mp.get_context("forkserver")
    ranks = []
    for rank in range(WORLD):
        environment = {
            "RANK": str(rank),
            "WORLD_SIZE": str(WORLD),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_ERROR_FILE": str(folder / "errors" / str(rank) / "error.json"),
        }
        ranks.append(context.Process(target=_rank, args=([how, str(victim)], folder, environment)))
    (folder / "errors").mkdir()
    for rank in ranks:
        rank.start()
    victims = ranks.pop(victim)
    for rank in ranks:
        rank.join(60)  # only a hang takes so long
    for rank in [victims, *ranks]:
        rank.kill()
    return [rank.exitcode for rank in ranks], (folder / "output").read_text().splitlines()


def _rank(arguments: list[str], folder: Path, environment: dict[str, str]) -> None:
    os.environ |= environment
    output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    importlib.import_module("lost_peer")  # adds its command to main
    main(["lose", *arguments])


def speakers(lines: list[str]) -> list[int]:
    """The ranks that say that they lost a peer in exchange 5; torch's own lines are left out."""
    words = re.compile(r"rank (\d) lost a peer in exchange 5 \(forward hits of layer1\), \d\.\d s after its start")
    return sorted(int(said[1]) for line in lines if (said := words.match(line)))
