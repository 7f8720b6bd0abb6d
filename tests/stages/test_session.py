"""What a session promises without a running Ray."""

import signal
import threading

import pytest

from tmkd_ray.stages.session import interruptible


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
