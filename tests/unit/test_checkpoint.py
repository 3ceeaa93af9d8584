"""Checkpoints: what comes back is what was there, to the bit, and what can be seen is whole, whatever happens while one is written."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from services.contracts.spec import RunSpec
from tests.unit.tiny_policy import same_bits, sampled_group, tiny_policy, weights
from trainer import checkpoint
from trainer.checkpoint import MANIFEST, OPTIMIZER, Checkpoints, Manifest, restore_optimizer
from trainer.policy import Policy
from trainer.step import make_optimizer, train_step

SPEC = RunSpec(batch_groups=2, group_size=2, versions=9, learning_rate=0.01)


def manifest(version: int) -> Manifest:
    return checkpoint.manifest("r", version, consumed=2 * version, issued=3 * version, knobs={"temperature": 0.5})


def trained(version: int) -> tuple[Policy, torch.optim.Optimizer]:
    """A policy after `version` steps, with its optimiser."""
    policy = tiny_policy()
    optimizer = make_optimizer(policy, SPEC)
    for v in range(version):
        step(policy, optimizer, v)
    return policy, optimizer


def step(policy: Policy, optimizer: torch.optim.Optimizer, version: int) -> None:
    groups = [sampled_group(tiny_policy(), 2 * version + i, [1.0, 0.0]) for i in range(2)]
    train_step(policy, optimizer, groups, SPEC, version)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_weights_moments_and_random_state_come_back_to_the_bit(tmp_path: Path) -> None:
    policy, optimizer = trained(2)
    torch.manual_seed(77)
    torch.rand(5)
    saved = Checkpoints(tmp_path / "c", keep=2).save(manifest(2), policy, optimizer)
    expected_random = torch.rand(3)

    found = Checkpoints(tmp_path / "c", keep=2).newest()
    assert found is not None
    folder, about = found
    assert folder == saved
    assert (about.run_id, about.version, about.consumed, about.issued, about.knobs) == ("r", 2, 4, 6, {"temperature": 0.5})
    back = Policy.load(folder)
    assert same_bits(weights(back), weights(policy))
    restored = make_optimizer(back, SPEC)
    restore_optimizer(folder, back, restored)
    assert torch.equal(torch.rand(3), expected_random)
    for (name, here), there in zip(policy.model.named_parameters(), back.model.parameters(), strict=True):
        assert optimizer.state[here].keys() == restored.state[there].keys() == {"step", "exp_avg", "exp_avg_sq"}, name
        assert same_bits(optimizer.state[here], restored.state[there]), name


def test_the_step_after_a_resume_is_the_step_that_would_have_been(tmp_path: Path) -> None:
    policy, optimizer = trained(2)
    folder = Checkpoints(tmp_path, keep=1).save(manifest(2), policy, optimizer)
    step(policy, optimizer, 2)

    def resumed(*, moments: bool) -> dict[str, torch.Tensor]:
        back = Policy.load(folder)
        fresh = make_optimizer(back, SPEC)
        if moments:
            restore_optimizer(folder, back, fresh)
        step(back, fresh, 2)
        return weights(back)

    assert same_bits(resumed(moments=True), weights(policy))
    assert not same_bits(resumed(moments=False), weights(policy)), "the moments matter"


def test_the_first_checkpoint_has_no_moments_yet(tmp_path: Path) -> None:
    policy, optimizer = trained(0)
    folder = Checkpoints(tmp_path, keep=1).save(manifest(0), policy, optimizer)
    back = Policy.load(folder)
    restored = make_optimizer(back, SPEC)
    restore_optimizer(folder, back, restored)
    step(policy, optimizer, 0)
    step(back, restored, 0)
    assert same_bits(weights(back), weights(policy))


def test_nothing_in_a_checkpoint_is_a_pickle(tmp_path: Path) -> None:
    folder = Checkpoints(tmp_path, keep=1).save(manifest(1), *trained(1))
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as tensors:
            assert tensors.keys()
    for path in folder.glob("*.json"):
        json.loads(path.read_text())


def test_the_newest_are_kept(tmp_path: Path) -> None:
    policy, optimizer = trained(0)
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.newest() is None
    for version in (3, 9, 10, 11):
        checkpoints.save(manifest(version), policy, optimizer)
    assert names(tmp_path) == ["v00000010", "v00000011"]
    found = checkpoints.newest()
    assert found is not None
    assert found[1].version == 11


def test_a_version_that_has_a_checkpoint_keeps_it(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    first = checkpoints.save(manifest(4), *trained(1))
    before = {path.name: path.stat().st_mtime_ns for path in first.iterdir()}
    assert checkpoints.save(manifest(4), *trained(1)) == first
    assert {path.name: path.stat().st_mtime_ns for path in first.iterdir()} == before


def killed_while(folder: Path, patch: Callable[[pytest.MonkeyPatch], None], policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    """A process of its own saves version 2, and is killed where `patch` says."""
    child = os.fork()
    if child == 0:
        with pytest.MonkeyPatch.context() as monkeypatch:
            patch(monkeypatch)
            Checkpoints(folder, keep=1).save(manifest(2), policy, optimizer)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_the_moments(patch: pytest.MonkeyPatch) -> None:
    def half(tensors: Any, path: Path) -> None:
        path.write_bytes(b"\x10\x00")
        die()

    patch.setattr(checkpoint, "save_file", half)


def before_the_manifest(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(checkpoint, "asdict", die)


def before_it_is_on_the_disk(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(checkpoint, "_sync", die)


def before_the_rename(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Path, "rename", die)


@pytest.mark.parametrize("patch", [in_the_moments, before_the_manifest, before_it_is_on_the_disk, before_the_rename])
def test_a_kill_while_one_is_written_leaves_the_one_before(tmp_path: Path, patch: Callable[[pytest.MonkeyPatch], None]) -> None:
    policy, optimizer = trained(1)
    Checkpoints(tmp_path, keep=1).save(manifest(1), policy, optimizer)
    killed_while(tmp_path, patch, policy, optimizer)
    assert names(tmp_path) == ["v00000001", "v00000002.tmp"], "it was in the middle of it"
    checkpoints = Checkpoints(tmp_path, keep=1)
    found = checkpoints.newest()
    assert found is not None
    assert found[1].version == 1
    assert names(tmp_path) == ["v00000001"], "what the dead trainer left is cleared away"
    assert same_bits(weights(Policy.load(found[0])), weights(policy))
    checkpoints.save(manifest(2), policy, optimizer)
    assert names(tmp_path) == ["v00000002"]


def test_a_kill_before_the_old_ones_are_deleted_leaves_both(tmp_path: Path) -> None:
    policy, optimizer = trained(1)
    Checkpoints(tmp_path, keep=1).save(manifest(1), policy, optimizer)
    killed_while(tmp_path, lambda patch: patch.setattr(checkpoint.Checkpoints, "_all", die), policy, optimizer)
    found = Checkpoints(tmp_path, keep=1).newest()
    assert found is not None
    assert (found[1].version, names(tmp_path)) == (2, ["v00000001", "v00000002"])


@pytest.fixture
def limited_file_size() -> Iterator[Callable[[int], None]]:
    """No file of this process may grow beyond so many bytes: writes fail as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [100, 50_000, 400_000], ids=["in the configuration", "in the weights", "in the moments"])
def test_a_disk_that_is_full_leaves_the_one_before(tmp_path: Path, limited_file_size: Callable[[int], None], size: int) -> None:
    policy, optimizer = trained(1)
    checkpoints = Checkpoints(tmp_path, keep=1)
    first = checkpoints.save(manifest(1), policy, optimizer)
    assert 100_000 < (first / "model.safetensors").stat().st_size < 400_000 < (first / OPTIMIZER).stat().st_size
    limited_file_size(size)
    with pytest.raises(OSError, match="File too large"):
        checkpoints.save(manifest(2), policy, optimizer)
    limited_file_size(resource.RLIM_INFINITY)
    assert names(tmp_path) == ["v00000001"]
    checkpoints.save(manifest(2), policy, optimizer)
    assert names(tmp_path) == ["v00000002"], "with room again it goes on"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small disk")
def test_a_small_disk_that_is_full_leaves_the_one_before(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"this machine lets nobody mount a disk: {mounted.stderr.strip()}")
    try:
        policy, optimizer = trained(1)
        checkpoints = Checkpoints(disk, keep=2)
        checkpoints.save(manifest(1), policy, optimizer)
        with pytest.raises(OSError, match="No space left on device"):
            checkpoints.save(manifest(2), policy, optimizer)
        assert names(disk) == ["v00000001"]
        assert (disk / "v00000001" / MANIFEST).is_file()
    finally:
        subprocess.run(["umount", str(disk)], check=True)
