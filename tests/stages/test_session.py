"""What a session promises without a running Ray."""

import signal
import threading

import pytest
import ray
from ray._private import ray_constants

from tmkd_ray.stages.session import interruptible, start_local_ray


def fit_that_takes_the_signal(signal_number: int | None) -> None:
    """As Ray Train does: a handler of its own, which ends the driver, and stays."""

    def handler(number: int, frame: object) -> None:
        raise SystemExit(0)

    signal.signal(signal.SIGINT, handler)
    if signal_number is not None:
        signal.raise_signal(signal_number)


def test_ctrl_c_is_a_keyboard_interrupt_in_a_training_and_after_it() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), interruptible():
            fit_that_takes_the_signal(signal.SIGINT)
        with interruptible():
            fit_that_takes_the_signal(None)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_no_handler_is_touched_in_another_thread() -> None:
    before = signal.getsignal(signal.SIGINT)
    reached = []

    def work() -> None:
        with interruptible():
            reached.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert reached == [before]


@pytest.mark.parametrize(
    ("problems", "tries"),
    [
        ([], 1),
        (["The current node timed out during startup."], 2),
        (["timed out during startup", "timed out during startup"], 2),
        (["no space left on device"], 1),
    ],
)
def test_a_ray_that_is_slow_to_start_is_started_once_more(
    monkeypatch: pytest.MonkeyPatch, problems: list[str], tries: int
) -> None:
    monkeypatch.setenv(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, "0")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", False)
    calls = []

    def init(**options: object) -> None:
        calls.append(options)
        if len(calls) <= len(problems):
            raise RuntimeError(problems[len(calls) - 1])

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    if len(problems) >= tries:
        with pytest.raises(RuntimeError, match=problems[-1]):
            start_local_ray(4)
    else:
        start_local_ray(4)
    assert len(calls) == tries
    assert all(call["num_cpus"] == 4 and call["address"] == "local" for call in calls)
