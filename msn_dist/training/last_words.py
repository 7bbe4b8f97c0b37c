"""Last words: a rank that has lost its peer gets to say so before it is ended."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from msn_dist.errors import PeerLost
from msn_dist.sharding.flight_record import GRACE, FlightRecord

PATIENCE = 5.0  # seconds from SIGTERM to the end; torchrun's agent kills after 30


@contextmanager
def last_words(record: FlightRecord) -> Iterator[None]:
    """While this is open, SIGTERM does not end the process at once, but after PATIENCE.

    As soon as one process dies, torchrun's agent sends SIGTERM to the others on its node.  In the time that they now
    have, those whose main thread waits in a collective that fails raise PeerLost by themselves.  For those that wait
    where nothing fails (on a GPU, on a peer that is stopped) a thread makes the error and hands it to
    `threading.excepthook`, also when NCCL is about to give an exchange up.  Call it from the main thread.
    """
    told, signals = os.pipe()
    os.set_blocking(signals, False)
    handler = signal.signal(signal.SIGTERM, _carry_on)
    wakeup = signal.set_wakeup_fd(signals)  # the handler itself has to wait for the main thread
    threading.Thread(target=_watch, args=(record, told), name="last words", daemon=True).start()
    yield  # after an error, which is still to be printed, all this stays as it is
    signal.set_wakeup_fd(wakeup)
    signal.signal(signal.SIGTERM, handler)
    os.close(signals)


def _carry_on(*_: object) -> None:
    pass


def _watch(record: FlightRecord, told: int) -> None:
    reason = "it has not completed on the device"
    while not record.is_overdue():
        if not select.select([told], [], [], 1.0)[0]:
            continue
        received = os.read(told, 64)
        if not received:  # closed: all is well
            os.close(told)
            return
        if signal.SIGTERM in received:
            time.sleep(PATIENCE)
            if record.idle() < (0.5 if record.speaking else GRACE):
                # it worked, or failed only when its peers were ended: somebody ends the whole job
                os._exit(_ENDED)
            reason = f"nothing has happened in the {PATIENCE:g} s since SIGTERM"
            break
    if record.speaking:
        time.sleep(3 * GRACE)
    else:
        error = record.account(reason)
        threading.excepthook(threading.ExceptHookArgs((PeerLost, error, None, threading.current_thread())))
    os._exit(_ENDED)


_ENDED = 128 + signal.SIGTERM


def _in_fork() -> None:
    """A forked child has no such thread, and must not write into its parent's pipe."""
    if signal.getsignal(signal.SIGTERM) is _carry_on:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


os.register_at_fork(after_in_child=_in_fork)
