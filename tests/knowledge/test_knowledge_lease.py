"""One writer at a time; a dead one's claim lapses, a live one's does not."""

import json
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from tmkd_ray import storage
from tmkd_ray.errors import UserError
from tmkd_ray.knowledge.lease import FILE, Claim, WriterLease

CLAIM = Claim(
    host="elsewhere",
    machine="another boot",
    pid=4711,
    process_start=99,
    token="theirs",
    started="2026-01-31T12:00:00+00:00",
    heartbeat="2026-01-31T12:00:00+00:00",
)


def put(folder: Path, claim: Claim, age_s: float = 0.0) -> Path:
    file = folder / FILE
    file.write_text(json.dumps(asdict(claim)))
    written = time.time() - age_s
    os.utime(file, (written, written))
    return file


def own_claim(folder: Path) -> Claim:
    """Return what a lease of this process writes."""
    with WriterLease(str(folder)):
        return Claim(**json.loads((folder / FILE).read_text()))


def until(condition: Callable[[], bool]) -> None:
    """Wait; a condition that never comes true is ended by pytest's own time limit."""
    while not condition():
        time.sleep(0.01)


def is_lost(lease: WriterLease) -> bool:
    try:
        lease.check()
    except UserError:
        return True
    return False


def test_a_claim_lasts_as_long_as_its_block(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "store"
    with WriterLease(str(folder)) as lease:
        lease.check()
        claim = json.loads((folder / FILE).read_text())
        assert claim["pid"] == os.getpid()
        assert claim["host"] == socket.gethostname()
        assert lease.took_over is None
    assert list(folder.iterdir()) == []
    with pytest.raises(KeyError), WriterLease(str(folder)):
        raise KeyError
    assert list(folder.iterdir()) == []


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    with WriterLease(str(tmp_path)) as lease:
        before = (tmp_path / FILE).read_bytes()
        with pytest.raises(UserError) as caught, WriterLease(str(tmp_path)):
            pytest.fail("both write")
        assert (tmp_path / FILE).read_bytes() == before
        lease.check()
    message = str(caught.value)
    for part in (
        str(tmp_path),
        f"process {os.getpid()} on {socket.gethostname()}",
        json.loads(before)["started"],
        "Wait until it ends, stop it, or give knowledge.path another folder",
    ):
        assert part in message
    with WriterLease(str(tmp_path)):
        """Free again."""


def hold(path: str, connection: Connection) -> None:
    with WriterLease(path):
        connection.send("held")
        connection.recv()


@pytest.fixture
def other_process(tmp_path: Path) -> Iterator[Any]:
    """A process that holds the lease of tmp_path, until it is told to end, or killed."""
    context = multiprocessing.get_context("fork")
    own, theirs = context.Pipe()
    process = context.Process(target=hold, args=(str(tmp_path), theirs))
    process.start()
    assert own.recv() == "held"
    process.tell = own.send  # type: ignore[attr-defined]
    yield process
    process.kill()
    process.join()


def test_two_processes(tmp_path: Path, other_process: Any) -> None:
    with pytest.raises(UserError, match=f"process {other_process.pid} on"), WriterLease(str(tmp_path)):
        pytest.fail("both write")
    other_process.tell("end")
    other_process.join()
    assert other_process.exitcode == 0
    with WriterLease(str(tmp_path)) as lease:
        assert lease.took_over is None


@pytest.mark.parametrize("reaped", [True, False])
def test_a_killed_process_is_succeeded_at_once(reaped: bool, tmp_path: Path, other_process: Any) -> None:
    os.kill(other_process.pid, signal.SIGKILL)
    if reaped:
        other_process.join()
    else:  # a zombie still has its number
        stat = Path(f"/proc/{other_process.pid}/stat")
        until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "Z")
    with WriterLease(str(tmp_path)) as lease:
        assert lease.took_over is not None
        assert f"process {other_process.pid} on {socket.gethostname()}" in lease.took_over
        assert "has ended" in lease.took_over
        lease.check()
    assert list(tmp_path.iterdir()) == []


def test_a_process_of_the_same_number_is_another(tmp_path: Path) -> None:
    """This very process's number, as a run that ended long ago had it."""
    claim = own_claim(tmp_path)
    put(tmp_path, replace(claim, process_start=claim.process_start - 1, token="theirs"))
    with WriterLease(str(tmp_path)) as lease:
        assert lease.took_over is not None
    put(tmp_path, replace(claim, token="theirs"), age_s=10_000)
    with pytest.raises(UserError, match=f"process {os.getpid()} on"), WriterLease(str(tmp_path)):
        pytest.fail("that process lives, however old its claim")


@pytest.mark.parametrize("heartbeat", ["2000-01-01T00:00:00+00:00", "2999-01-01T00:00:00+00:00"])
def test_another_machine_by_the_age_of_its_claim(heartbeat: str, tmp_path: Path) -> None:
    """By the storage's clock: what the other machine's own clock says does not matter."""
    claim = replace(CLAIM, heartbeat=heartbeat)
    file = put(tmp_path, claim, age_s=20)
    with pytest.raises(UserError) as caught, WriterLease(str(tmp_path)):
        pytest.fail("it may live")
    message = str(caught.value)
    assert "process 4711 on elsewhere, since 2026-01-31T12:00:00+00:00" in message
    (seconds,) = [int(word) for word in message.partition("start this one again in ")[2].split()[:1]]
    assert 30 <= seconds <= 41
    assert list(tmp_path.iterdir()) == [file]
    assert json.loads(file.read_text())["token"] == "theirs"

    put(tmp_path, claim, age_s=61)
    with WriterLease(str(tmp_path)) as lease:
        assert lease.took_over is not None
        assert "process 4711 on elsewhere" in lease.took_over
        assert list(tmp_path.iterdir()) == [file]
    assert list(tmp_path.iterdir()) == []


def test_storage_that_tells_no_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the claim's own time has to do."""
    monkeypatch.setattr("tmkd_ray.storage.modified_s", lambda path: None)
    put(tmp_path, replace(CLAIM, heartbeat="2999-01-01T00:00:00+00:00"))
    with pytest.raises(UserError, match="elsewhere"), WriterLease(str(tmp_path)):
        pytest.fail("it may live")
    put(tmp_path, CLAIM)
    with WriterLease(str(tmp_path)) as lease:
        assert lease.took_over is not None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pid": 1}', b"\xff\xfe"])
def test_what_is_no_claim_keeps_nobody_out(content: bytes, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(content)
    with WriterLease(str(tmp_path)) as lease:
        lease.check()
    assert list(tmp_path.iterdir()) == []


def test_renewed_while_it_is_held(tmp_path: Path) -> None:
    with WriterLease(str(tmp_path), renew_s=0.01) as lease:
        file = tmp_path / FILE
        first = Claim(**json.loads(file.read_text()))
        for _ in range(3):
            os.utime(file, (0, 0))
            until(lambda: file.stat().st_mtime > 0)
        claim = Claim(**json.loads(file.read_text()))
        assert replace(claim, heartbeat=first.heartbeat) == first
        assert claim.heartbeat >= first.heartbeat
        lease.check()
    assert list(tmp_path.iterdir()) == []


def test_a_writer_learns_that_it_was_succeeded(tmp_path: Path) -> None:
    with WriterLease(str(tmp_path), renew_s=0.01) as lease:
        (tmp_path / "theirs.json").write_text(json.dumps(asdict(CLAIM)))
        # A renewal may be under way, and overwrite this: then the other one has lost.
        until(
            lambda: (
                bool((tmp_path / "theirs.json").replace(tmp_path / FILE))
                and is_lost_or_put_back(lease, tmp_path)
            )
        )
        with pytest.raises(UserError) as caught:
            lease.check()
    message = str(caught.value)
    assert str(tmp_path) in message
    assert "process 4711 on elsewhere" in message
    assert json.loads((tmp_path / FILE).read_text())["token"] == "theirs", "not ours to delete"


def is_lost_or_put_back(lease: WriterLease, folder: Path) -> bool:
    """Wait until the lease is lost; if it won instead, lay out the other claim once more."""
    for _ in range(20):
        if is_lost(lease):
            return True
        time.sleep(0.01)
    (folder / "theirs.json").write_text(json.dumps(asdict(CLAIM)))
    return False


def test_a_writer_that_slept_learns_it_when_it_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread has had no time to renew: `check` does not rely on it."""
    awake = time.monotonic
    with WriterLease(str(tmp_path), renew_s=1000) as lease:
        put(tmp_path, CLAIM)
        lease.check()  # renewed a moment ago: not asked again
        monkeypatch.setattr(time, "monotonic", lambda: awake() + 2001)
        with pytest.raises(UserError, match=r"took over .* process 4711 on elsewhere"):
            lease.check()
        with pytest.raises(UserError, match="took over"):
            lease.check()


def test_a_deleted_claim_is_lost(tmp_path: Path) -> None:
    with WriterLease(str(tmp_path), renew_s=0.01) as lease:
        # A renewal that is under way may write it once more.
        until(lambda: (tmp_path / FILE).unlink(missing_ok=True) or is_lost(lease))
        with pytest.raises(UserError, match=f"{tmp_path}/{FILE} was deleted"):
            lease.check()


def test_an_outage_of_the_storage_is_outlived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, failed = storage.write_bytes, []

    def fail(path: str, content: bytes) -> None:
        failed.append(path)
        raise UserError(f"cannot write {path}: no answer")

    with WriterLease(str(tmp_path), renew_s=0.01) as lease:
        monkeypatch.setattr(storage, "write_bytes", fail)
        until(lambda: len(failed) > 3)
        monkeypatch.setattr(storage, "write_bytes", write)
        os.utime(tmp_path / FILE, (0, 0))
        until(lambda: (tmp_path / FILE).stat().st_mtime > 0)
        lease.check()


def silence(path: str, content: bytes = b"") -> None:
    raise UserError(f"{path}: no answer")


def test_a_storage_that_stays_silent_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By `check`, once a renewal is overdue; and at the end, unless the block failed of something else."""
    awake = time.monotonic
    lease = WriterLease(str(tmp_path), renew_s=1000).__enter__()
    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes", silence)
        patch.setattr(time, "monotonic", lambda: awake() + 2001)
        with pytest.raises(UserError, match=f"{FILE}: no answer"):
            lease.check()
    monkeypatch.setattr(storage, "delete", silence)
    with pytest.raises(UserError, match=f"{FILE}: no answer"):
        lease.__exit__(None, None, None)
    with pytest.raises(KeyError), WriterLease(str(tmp_path / "another")):
        raise KeyError


def test_two_claims_at_the_same_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both found the store free; the claim that was written last holds."""
    sleep = time.sleep

    def meanwhile(seconds: float) -> None:
        put(tmp_path, CLAIM)
        sleep(seconds)

    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", meanwhile)
        with pytest.raises(UserError, match="at the same moment: process 4711 on elsewhere"):
            WriterLease(str(tmp_path)).__enter__()
    assert json.loads((tmp_path / FILE).read_text())["token"] == "theirs"


def test_interrupted_while_claiming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing stays behind that would keep this process out, should it try again."""

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", interrupt)
        with pytest.raises(KeyboardInterrupt):
            WriterLease(str(tmp_path)).__enter__()
    assert list(tmp_path.iterdir()) == []
