"""For all tests."""

import signal

import pytest
from hypothesis import settings

settings.register_profile("offbeat", deadline=None)  # machines are shared: what is slow once is no failure
settings.load_profile("offbeat")


@pytest.fixture(autouse=True, scope="session")
def interrupts_interrupt() -> None:
    """A shell starts what it runs in the background with SIGINT ignored, and Python leaves it so: tests that interrupt would wait for ever."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
