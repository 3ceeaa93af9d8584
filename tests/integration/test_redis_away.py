"""Processes that are started before Redis: each says what it waits for, goes on when Redis comes, and ends when asked while it waits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.integration.conftest import OwnRedis, free_port, wait_until

PROGRAMS = ["services.control_plane", "reward_server", "rollout_server", "trainer"]


@pytest.fixture(params=PROGRAMS)
def early(request: pytest.FixtureRequest, own_redis: OwnRedis, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    token = tmp_path / "token"
    token.write_text("t" * 32)
    port = free_port()
    settings = {
        "REDIS_URL": own_redis.url, "PORT": str(port), "TOKEN_FILE": str(token), "CLUSTER_TOKEN_FILE": str(token),
        "DATA": str(tmp_path / "runs"), "MEMBER": "early",
    }  # fmt: skip
    env = os.environ | {f"OFFBEAT_{name}": value for name, value in settings.items()}
    with (tmp_path / "log").open("wb") as output, subprocess.Popen([sys.executable, "-m", request.param], env=env, stderr=output) as process:
        yield process, f"http://127.0.0.1:{port}/readyz"
        process.kill()


def answer(url: str) -> httpx.Response | None:
    try:
        return httpx.get(url, trust_env=False)
    except httpx.TransportError:
        return None


def test_waits_for_redis_and_says_so(early: tuple[subprocess.Popen[bytes], str], own_redis: OwnRedis) -> None:
    process, url = early
    waiting = wait_until(lambda: answer(url), seconds=60)
    assert waiting.status_code == 503
    assert waiting.json()["detail"] == "waits for Redis"
    own_redis.start()
    wait_until(lambda: (now := answer(url)) is not None and now.status_code == 200, seconds=30)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 0


def test_ends_when_it_is_asked_to_while_it_waits(early: tuple[subprocess.Popen[bytes], str]) -> None:
    process, url = early
    wait_until(lambda: answer(url), seconds=60)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=20)
