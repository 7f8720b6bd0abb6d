"""An actor far slower than the others: it holds up its own shards and no others, and the store is the same."""

import concurrent.futures
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from run_processes import committed, descendants, titled, wait_until

from tmkd_ray.cli import main
from tmkd_ray.models import build_model
from tmkd_ray.types import TaskSpec

pytestmark = pytest.mark.ray

NUM_SHARDS = 45 + 5
GOES_ON = 12
"""Shards that are done while it stands still: more than were on their way already."""


def contents(store: Path) -> dict[str, bytes]:
    return {str(file.relative_to(store)): file.read_bytes() for file in store.rglob("*") if file.is_file()}


def test_a_straggler(ray_cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One of two view actors stands still; the other goes on with what is left."""
    torch.manual_seed(0)
    torch.save(build_model("resnet8", TaskSpec(tuple("0123456789"), 32)).state_dict(), tmp_path / "w.pth")
    options = [
        *("dataset=digits", "dataset.limit=400", "distiller=kd", "teacher.text=null"),
        *("teacher.visual.model=resnet8", f"teacher.visual.checkpoint={tmp_path / 'w.pth'}"),
        *("knowledge.shard_rows=8", "knowledge.visual.batch_size=64", f"output={tmp_path}"),
        *("knowledge.views.min_size=2", "knowledge.views.max_size=2"),
    ]
    assert main(["knowledge", *options, f"knowledge.path={tmp_path / 'whole'}"]) == 0
    store = tmp_path / "store"

    def hold_one() -> tuple[int, int]:
        wait_until(lambda: len(committed(store)) > 2)
        slow, _ = titled(descendants(os.getpid()), "MapBatches(ViewStage)")
        before = len(committed(store))
        slow.send_signal(signal.SIGSTOP)
        try:
            wait_until(lambda: len(committed(store)) >= before + GOES_ON)
        finally:
            slow.send_signal(signal.SIGCONT)
        return before, len(committed(store))

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        holding = pool.submit(hold_one)
        started = time.monotonic()
        assert main(["knowledge", *options, f"knowledge.path={store}"]) == 0
        seconds = time.monotonic() - started
        before, meanwhile = holding.result()
    assert before + GOES_ON <= meanwhile < NUM_SHARDS
    counts = re.findall(r"knowledge: (\d+)/400", capsys.readouterr().err)
    assert counts[-1] == "400", "each image once"
    assert contents(store) == contents(tmp_path / "whole")
    print(f"{meanwhile - before} of {NUM_SHARDS} shards while one of two stood still; {seconds:.1f} s in all")
