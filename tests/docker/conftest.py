"""A Docker engine and a base image for the tests of this folder, which all have the marker `docker`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from tests.docker.engine import Engine, Unavailable, any_engine, debian_rootfs

FOLDER = Path(__file__).parent
BASE = "offbeat-test/debian:bookworm"
PACKAGES = ("g++", "python3")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-docker", action="store_true", help="fail where there is no Docker engine, and none can be started")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.docker)
            item.add_marker(pytest.mark.timeout(3_600))


def give_up(config: pytest.Config, reason: Unavailable) -> NoReturn:
    if config.getoption("--require-docker"):
        pytest.fail(str(reason), pytrace=False)
    pytest.skip(str(reason))


@pytest.fixture(scope="session")
def engine(pytestconfig: pytest.Config) -> Iterator[Engine]:
    with contextlib.ExitStack() as stack:
        try:
            engine = stack.enter_context(any_engine())
        except Unavailable as reason:
            give_up(pytestconfig, reason)
        yield engine


@pytest.fixture(scope="session")
def base_image(engine: Engine, pytestconfig: pytest.Config) -> Iterator[str]:
    """Debian with Python and a C++ compiler."""
    try:
        engine.import_rootfs(debian_rootfs(PACKAGES), BASE)
    except Unavailable as reason:
        give_up(pytestconfig, reason)
    yield BASE
    engine.docker("image", "rm", BASE)
