"""The sandbox's small parts: which tiers are tried, what limits an error stands for, folders, paths, frames."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from reward_server.sandbox import folders, frames, landlock
from reward_server.sandbox.jobs import Cause, Limits, Reply, Tier
from reward_server.sandbox.limits import cause_of
from reward_server.sandbox.messages import Setup, limits_message, limits_of
from reward_server.sandbox.paths import around, outermost, readable
from reward_server.sandbox.probe import Facts, breaches, candidates


def test_without_seccomp_nothing_is_tried() -> None:
    assert candidates(Facts(seccomp=False, landlock=7), outer=False, root=True) == []
    assert candidates(Facts(seccomp=False, landlock=7), outer=True, root=True) == []


def test_with_landlock_the_strongest_tier_is_tried_first() -> None:
    assert candidates(Facts(seccomp=True, landlock=7), outer=False, root=True) == [Tier.NAMESPACES, Tier.LANDLOCK]
    assert candidates(Facts(seccomp=True, landlock=3), outer=True, root=True) == [Tier.NAMESPACES, Tier.LANDLOCK]


@pytest.mark.parametrize("version", [0, 1, 2])
def test_without_landlock_an_outer_sandbox_must_be_declared(version: int) -> None:
    assert candidates(Facts(seccomp=True, landlock=version), outer=False, root=True) == []
    assert candidates(Facts(seccomp=True, landlock=version), outer=True, root=True) == [Tier.OUTER]
    assert candidates(Facts(seccomp=True, landlock=version), outer=True, root=False) == []  # a job could read the server's memory


class FakeSession:
    """Refuses all attacks but those named."""

    def __init__(self, *succeed: str, load_error: str = "") -> None:
        self.succeed, self.load_error = succeed, load_error
        self.asked: list[str] = []

    def load(self, code: str, *, seconds: float) -> Reply:
        return Reply(error=self.load_error)

    def call(self, name: str, args: list[Any], kwargs: dict[str, Any], *, seconds: float) -> Reply:
        self.asked.append(name)
        return Reply(error="" if name in self.succeed else "PermissionError: no")

    program = command = write = __enter__ = __exit__ = None  # type: ignore[assignment]


LIBRARY = "imports_what_is_not_loaded"


def test_a_tier_that_holds_has_no_breaches() -> None:
    assert breaches(FakeSession(LIBRARY), Tier.LANDLOCK, root=True) == []


def test_an_attack_that_gets_through_is_named() -> None:
    assert breaches(FakeSession(LIBRARY, "forks"), Tier.NAMESPACES, root=False) == ["forks()"]
    assert "reads_files(/etc/passwd)" in breaches(FakeSession(LIBRARY, "reads_files"), Tier.LANDLOCK, root=False)


def test_a_tier_in_which_nothing_runs_is_refused() -> None:
    assert breaches(FakeSession(load_error="MemoryError"), Tier.LANDLOCK, root=False) == ["cannot be tested: MemoryError"]
    [reason] = breaches(FakeSession(), Tier.LANDLOCK, root=False)
    assert "interpreter that their user can read" in reason


def test_attacks_depend_on_the_tier_and_the_user() -> None:
    outer, root = FakeSession(LIBRARY), FakeSession(LIBRARY)
    breaches(outer, Tier.OUTER, root=False)
    breaches(root, Tier.LANDLOCK, root=True)
    assert "reads_files" not in outer.asked
    assert "opens_sockets" in outer.asked
    assert {"reads_files", "is_root"} <= set(root.asked)


@pytest.mark.parametrize(
    ("raised", "cause"),
    [
        (MemoryError(), Cause.MEMORY), (OSError(errno.ENOSPC, ""), Cause.FILES), (OSError(errno.EFBIG, ""), Cause.FILES),
        (BlockingIOError(errno.EAGAIN, ""), Cause.PROCESSES), (RuntimeError("can't start new thread"), Cause.PROCESSES), (RuntimeError("x"), None),
        (OSError(errno.EPERM, ""), None), (SystemExit(0), None),
    ],
)  # fmt: skip
def test_errors_that_stand_for_limits(raised: BaseException, cause: Cause | None) -> None:
    assert cause_of(raised) is cause


def test_settings_come_back_from_their_messages() -> None:
    limits = Limits(seconds=1.5, commands=True, processes=7)
    assert limits_of(limits_message(limits)) == limits
    setup = Setup(Tier.LANDLOCK, "x86_64", {"read": 0}, "/tmp/x", 62_000, 2, True, "/site", ("numpy",))
    assert Setup.decode(setup.encode()) == setup


def test_folders_are_measured(tmp_path: Path) -> None:
    assert folders.within(str(tmp_path), 0)
    (tmp_path / "a").write_bytes(b"x" * 10_000)
    assert folders.within(str(tmp_path), 1 << 20)
    assert not folders.within(str(tmp_path), 1_000)
    (tmp_path / "link").symlink_to("/")
    assert folders.within(str(tmp_path), 1 << 20)


def test_many_or_deep_folders_are_too_much(tmp_path: Path) -> None:
    many, deep = tmp_path / "many", tmp_path / "deep"
    many.mkdir()
    for n in range(folders.MOST_FILES + 1):
        (many / str(n)).touch()
    assert not folders.within(str(many), 1 << 30)
    deep.joinpath(*["d"] * (folders.DEEPEST + 2)).mkdir(parents=True)
    assert not folders.within(str(deep), 1 << 30)


def test_folders_of_any_depth_are_removed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("stays")
    target = tmp_path / "target"
    target.mkdir()
    here = os.getcwd()
    try:
        os.chdir(target)
        for _ in range(3_000):  # deeper than the recursion limit, and than a path can be long
            os.mkdir("d")
            os.symlink(outside, "link")
            os.chdir("d")
    finally:
        os.chdir(here)
    (target / "closed").mkdir()
    (target / "closed" / "file").touch()
    (target / "closed").chmod(0)
    folders.remove(str(target))
    assert not target.exists()
    assert outside.read_text() == "stays"
    folders.remove(str(target))


def test_names_that_stand_in_the_way_of_removing_do_not(tmp_path: Path) -> None:
    target = tmp_path / "target"
    for n in range(40):
        (target / f".lifted-{os.getpid()}-{n}" / "a" / "b").mkdir(parents=True)
        (target / f"{n}" / f".lifted-{os.getpid()}-{n}" / "c").mkdir(parents=True)
    folders.remove(str(target))
    assert not target.exists()


def test_removed_files_that_are_held_count(tmp_path: Path) -> None:
    path, most = tmp_path / "x", 1 << 20
    with open(path, "wb") as file:
        file.write(b"x" * most * 2)
    held = os.open(path, os.O_RDONLY)
    path.unlink()
    assert folders.removed(os.getpid(), str(tmp_path), most) == 2 * most
    assert folders.removed(os.getpid(), f"{tmp_path}x", most) == folders.removed(1 << 30, str(tmp_path), most) == 0
    assert folders.within(str(tmp_path), most, removed=most)
    assert not folders.within(str(tmp_path), most, removed=most + 1)
    os.close(held)
    assert folders.removed(os.getpid(), str(tmp_path), most) == 0


def test_what_cannot_be_looked_into_is_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed, scan = tmp_path / "closed", os.scandir
    closed.mkdir()

    def scandir(path: str) -> Any:  # root may look anywhere
        if path == str(closed):
            raise PermissionError(path)
        return scan(path)

    assert folders.within(str(tmp_path), 1 << 20)
    monkeypatch.setattr(folders.os, "scandir", scandir)
    assert not folders.within(str(tmp_path), 1 << 20)


def test_only_plain_files_are_made_executable(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).touch(0o600)
    (tmp_path / "link").symlink_to("b")
    for name in ("a", "link", "none", "."):
        folders.make_executable(f"{tmp_path}/{name}")
    assert [os.stat(tmp_path / name).st_mode & 0o777 for name in ("a", "b")] == [0o700, 0o600]


def test_paths_around_what_is_hidden(tmp_path: Path) -> None:
    for name in ("lib/python/json", "lib/python/site-packages/torch", "lib/other"):
        (tmp_path / name).mkdir(parents=True)
    root, hidden = str(tmp_path), f"{tmp_path}/lib/python/site-packages"
    assert around(root, [hidden]) == [f"{root}/lib/other", f"{root}/lib/python/json"]
    assert around(root, []) == [root]
    assert around(hidden, [hidden]) == []
    assert outermost([f"{root}/lib/other", f"{root}/lib", f"{root}/none", f"{root}/lib"]) == [f"{root}/lib"]


def test_jobs_may_read_the_library_and_not_the_packages() -> None:
    import numpy

    site = str(Path(numpy.__file__).parents[1])
    shown = readable(site, (), tools=False)
    within = lambda path: any(f"{path}/".startswith(f"{folder}/") for folder in shown.job)  # noqa: E731
    assert within(os.path.realpath(os.__file__))
    assert shown.tools == []
    assert not within("/etc/passwd")
    assert not within("/usr/bin")
    for package in ("numpy", "torch", "reward_server"):
        path = f"{site}/{package}"
        assert not within(path) or any(path.startswith(f"{hidden}/") for hidden in shown.hidden)
    assert f"{os.path.realpath(site)}/numpy" in readable(site, ("numpy",), tools=False).job
    assert "/usr" in readable(site, (), tools=True).tools


def test_rights_of_a_file_are_those_that_a_file_can_have(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    rules = [landlock.beneath(str(path), landlock.TREES) for path in (tmp_path, tmp_path / "file")]
    for rule in rules:
        os.close(rule.descriptor)
    assert rules[0].allowed == landlock.TREES
    assert landlock.Access.READ_DIR not in rules[1].allowed
    assert landlock.Access.WRITE_FILE in rules[1].allowed
    assert landlock.Access.EXECUTE not in landlock.TREES
    assert not landlock.TREES & (landlock.Access.MAKE_SOCK | landlock.Access.MAKE_CHAR | landlock.Access.MAKE_BLOCK | landlock.Access.MAKE_FIFO)


def test_frames_come_back_and_end() -> None:
    reading, writing = os.pipe()
    try:
        frames.write_all(writing, frames.framed("[1]") + frames.framed("") + b"\x05\x00")
        os.close(writing)
        assert [frames.read_frame(reading) for _ in range(3)] == ["[1]", "", None]
    finally:
        os.close(reading)
    with pytest.raises(UnicodeEncodeError):
        frames.framed("é")
