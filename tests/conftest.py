"""For all tests."""

import signal

import pytest


@pytest.fixture(autouse=True, scope="session")
def interrupts_interrupt() -> None:
    """A shell starts what it runs in the background with SIGINT ignored, and Python leaves it so: tests that interrupt would wait for ever."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
