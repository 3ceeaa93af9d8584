"""What a process must know to start, and the secrets that it refuses to start with."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from pydantic import ValidationError

from services.runtime.settings import MissingSecret, Settings

GOOD = "0123456789abcdef"


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OFFBEAT_")]:
        monkeypatch.delenv(name)


def holding(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "token"
    path.write_text(text)
    return path


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFBEAT_PORT", "9001")
    monkeypatch.setenv("OFFBEAT_HOST", "0.0.0.0")
    monkeypatch.setenv("OFFBEAT_ADVERTISE", "10.0.0.7")
    monkeypatch.setenv("OFFBEAT_MEMBER", "rollout-3")
    monkeypatch.setenv("OFFBEAT_UNKNOWN", "to a newer release")
    settings = Settings()
    assert (settings.url, settings.member) == ("http://10.0.0.7:9001", "rollout-3")


def test_without_an_environment_a_process_is_local_and_has_a_name_of_its_own() -> None:
    settings = Settings()
    assert (settings.host, settings.url) == ("127.0.0.1", "http://127.0.0.1:8700")
    assert settings.member == f"{socket.gethostname()}-{os.getpid()}"


@pytest.mark.parametrize(("name", "value"), [("PORT", "0"), ("PORT", "many"), ("MAX_SEQUENCES", "1"), ("REWARD_THREADS", "0")])
def test_a_wrong_setting_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"OFFBEAT_{name}", value)
    with pytest.raises(ValidationError, match=name.lower()):
        Settings()


def test_a_token_is_read_from_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = holding(tmp_path, f"  {GOOD}\n")
    monkeypatch.setenv("OFFBEAT_TOKEN_FILE", str(path))
    monkeypatch.setenv("OFFBEAT_CLUSTER_TOKEN_FILE", str(path))
    assert (Settings().token, Settings().cluster_token) == (GOOD, GOOD)
    assert GOOD not in repr(Settings())


def test_there_is_no_default_token() -> None:
    with pytest.raises(
        MissingSecret, match=r"^OFFBEAT_TOKEN_FILE is not set: name a file that holds a token \(`offbeat up` makes one; there is no default\)"
    ):
        _ = Settings().token
    with pytest.raises(MissingSecret, match=r"^OFFBEAT_CLUSTER_TOKEN_FILE is not set"):
        _ = Settings().cluster_token


@pytest.mark.parametrize("text", ["", "\n", "changeme", "secret", "password", "short", GOOD[:-1]])
def test_a_token_that_anybody_could_guess_is_refused(tmp_path: Path, text: str) -> None:
    path = holding(tmp_path, text)
    with pytest.raises(MissingSecret, match="holds no usable token: at least 16 characters, and no sample value") as caught:
        _ = Settings(token_file=path).token
    assert str(path) in str(caught.value)
    if text.strip():
        assert f" {text}" not in str(caught.value).replace(str(path), ""), "a secret is not shown, not even a bad one"


def test_a_token_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingSecret, match=r"^OFFBEAT_TOKEN_FILE: cannot read .*/nowhere: No such file or directory$"):
        _ = Settings(token_file=tmp_path / "nowhere").token


def test_the_password_of_redis_is_read_from_its_file_and_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFBEAT_REDIS_PASSWORD_FILE", str(holding(tmp_path, "p@ss/word:0123456\n")))
    monkeypatch.setenv("OFFBEAT_REDIS_URL", "redis://redis:6379/0")
    assert Settings().redis_url == "redis://:p%40ss%2Fword%3A0123456@redis:6379/0"
    assert "p%40ss" not in repr(Settings())


def test_two_passwords_of_redis_are_refused_and_neither_is_shown(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="OFFBEAT_REDIS_PASSWORD_FILE names another") as caught:
        Settings(redis_url=f"redis://:{GOOD[::-1]}@redis:6379/0", redis_password_file=holding(tmp_path, GOOD))
    assert GOOD not in str(caught.value)
    assert GOOD[::-1] not in str(caught.value)


def test_a_password_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"OFFBEAT_REDIS_PASSWORD_FILE: cannot read .*/nowhere"):
        Settings(redis_password_file=tmp_path / "nowhere")


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_who_listens_on_all_addresses_is_reached_by_the_name_of_the_machine(host: str) -> None:
    settings = Settings(host=host)
    assert (settings.advertise, settings.url) == (socket.gethostname(), f"http://{socket.gethostname()}:8700")
    assert Settings(host=host, advertise="10.0.0.7").url == "http://10.0.0.7:8700"
    assert Settings().advertise is None
