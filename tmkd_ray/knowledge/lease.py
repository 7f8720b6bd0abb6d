"""One writer at a time: a claim on a store that lapses when its owner dies.

`writer.json` says who writes: machine, process, and a random token; a thread of the owner renews it. Whether an
owner still lives is known at once on its own machine, by its process; for another machine it is judged by how
long ago the claim was renewed, and both times of that comparison are modification times that the storage gave,
so that no machine's clock has to agree with another's.

Not every storage can create a file only where there is none, so a claim is written, and holds if it is still
there a moment later. Should two writers pass all the same, the one whose token was overwritten learns of it
when it renews; shards are named by their content, so even then no file is spoilt.
"""

import json
import os
import secrets
import socket
import threading
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from pydantic import TypeAdapter, ValidationError

from tmkd_ray import storage
from tmkd_ray.errors import UserError

FILE = "writer.json"

_ADVICE = "Wait until it ends, stop it, or give knowledge.path another folder"


@dataclass(frozen=True)
class Claim:
    """The content of `writer.json`.

    Attributes:
        machine: host, boot and process namespace, within which `pid` and `process_start` name one process.
        process_start: in clock ticks since boot, so that a later process of the same number is not taken for
            this one.
        started, heartbeat: when the run began and last renewed, UTC, for people.
    """

    host: str
    machine: str
    pid: int
    process_start: int
    token: str
    started: str
    heartbeat: str


_CLAIM = TypeAdapter(Claim)


class WriterLease:
    """The right to write a store, while the block lasts.

    Attributes:
        took_over: a sentence for the user if the claim of a dead run was taken over, else None.

    Args:
        renew_s: seconds between renewals.
        expiry_s: after so many seconds without one, another machine's claim is void.

    Raises:
        UserError: on entering, that another run writes this store; names it, and says what to do.
    """

    took_over: str | None = None

    def __init__(self, store_path: str, *, renew_s: float = 10.0, expiry_s: float = 60.0) -> None:
        self.store_path = store_path
        self.renew_s = renew_s
        self.expiry_s = expiry_s
        self._path = storage.join(store_path, FILE)
        self._claim = Claim(
            host=socket.gethostname(),
            machine=_this_machine(),
            pid=os.getpid(),
            process_start=_process_start(os.getpid()) or 0,
            token=secrets.token_hex(16),
            started=_now(),
            heartbeat=_now(),
        )
        self._lock = threading.Lock()
        self._lost: str | None = None
        self._renewed_s = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="knowledge store lease", daemon=True)

    def __enter__(self) -> "WriterLease":
        found = self._read()
        if found is not None:
            self._take_over(found)
        try:
            self._write()
            # Longer than the gap between another's look and its write, which are one request each.
            time.sleep(1.0 if "://" in self.store_path else 0.25)
            found = self._read()
            if found is None or found.token != self._claim.token:
                raise UserError(
                    f"another run claimed the knowledge store at {self.store_path} at the same moment"
                    f"{'' if found is None else f': {_owner(found)}'}. {_ADVICE}"
                )
        except BaseException:
            self._release()
            raise
        self._renewed_s = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()
        try:
            self._release()
        except UserError:
            if error is None:
                raise
            # The block's own error says more: the storage may be what failed. The claim lapses by itself.

    def _release(self) -> None:
        found = self._read()
        if found is not None and found.token == self._claim.token:
            storage.delete(self._path)

    def check(self) -> None:
        """Make sure that this run still is the one that writes.

        Raises:
            UserError: it is not; names the other.
        """
        if time.monotonic() - self._renewed_s > 2 * self.renew_s:
            self._renew()  # the thread is late: the machine slept, or the storage does not answer
        if self._lost is not None:
            raise UserError(self._lost)

    def _keep(self) -> None:
        while self._lost is None and not self._done.wait(self.renew_s):
            try:
                self._renew()
            except UserError:
                # The storage does not answer: tried again next time, and by `check`, which raises it.
                continue

    def _renew(self) -> None:
        with self._lock:
            found = self._read()
            if found is None:
                self._lost = (
                    f"{self._path} was deleted while this run wrote the knowledge store; start it again, "
                    "and if another run writes the same store, stop one of them"
                )
            elif found.token != self._claim.token:
                self._lost = (
                    f"another run took over the knowledge store at {self.store_path} while this one could not "
                    f"renew its claim: {_owner(found)}. What is committed stays; wait until it ends, or give "
                    "knowledge.path another folder"
                )
            else:
                self._write()
                self._renewed_s = time.monotonic()

    def _take_over(self, found: Claim) -> None:
        """Return if the claim is void; else raise."""
        if found.machine == self._claim.machine:
            if _process_start(found.pid) == found.process_start:
                raise UserError(self._refusal(found))
            self.took_over = f"took over the knowledge store from {_owner(found)}: that process has ended"
            return
        age = self._age_s(found)
        if age <= self.expiry_s:
            raise UserError(
                f"{self._refusal(found)}. If that run is dead, start this one again in "
                f"{self.expiry_s - age + 1:.0f} s: its claim lapses then"
            )
        self.took_over = (
            f"took over the knowledge store from {_owner(found)}: its last sign of life is {age:.0f} s ago"
        )

    def _age_s(self, found: Claim) -> float:
        """Return the seconds since a claim was last renewed, by the storage's clock."""
        probe = f"{self._path}.{self._claim.token}"
        storage.write_bytes(probe, b"")
        try:
            now, renewed = storage.modified_s(probe), storage.modified_s(self._path)
        finally:
            storage.delete(probe)
        if now is None or renewed is None:  # no such clock: trust the machines' own
            now, renewed = time.time(), datetime.fromisoformat(found.heartbeat).timestamp()
        return now - renewed

    def _refusal(self, owner: Claim) -> str:
        return f"another run writes the knowledge store at {self.store_path}: {_owner(owner)}. {_ADVICE}"

    def _read(self) -> Claim | None:
        """Return the claim that lies there; None if there is none, or none that can be read."""
        if not storage.exists(self._path):
            return None
        try:
            return _CLAIM.validate_json(storage.read_bytes(self._path))
        except ValidationError:
            return None

    def _write(self) -> None:
        content = asdict(self._claim) | {"heartbeat": _now()}
        storage.write_bytes(self._path, (json.dumps(content, indent=1) + "\n").encode())


def _owner(claim: Claim) -> str:
    return f"process {claim.pid} on {claim.host}, since {claim.started}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _this_machine() -> str:
    """Return what tells apart all places where process numbers mean something else."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    if not boot.exists():
        # No /proc (macOS): processes cannot be told apart for sure, so every claim goes by its age.
        return secrets.token_hex(16)
    return f"{boot.read_text().strip()} {os.readlink('/proc/self/ns/pid')}"


def _process_start(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot (proc(5), field 22); None if it does not run."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()  # the name, in brackets, may hold anything
    return None if fields[0] in "ZX" else int(fields[19])
