"""Checkpoints: weights in Hugging Face format, the optimiser's moments and random state in safetensors, and a manifest. No pickles.

A checkpoint is written beside its place and renamed into it, so that what can be seen is whole. The newest one there is the one to resume from.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from trainer.policy import Policy

MANIFEST = "manifest.json"
OPTIMIZER = "optimizer.safetensors"
RNG = "rng"


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds, for people and for `GET /v1/runs/{id}/checkpoints`."""

    run_id: str
    version: int
    consumed: int
    """Groups consumed by then."""
    issued: int
    """The prompt cursor by then."""
    knobs: dict[str, Any]
    made_at: float
    control: dict[str, dict[str, float]] = field(default_factory=dict)
    """State of each controller."""


class Checkpoints:
    """The checkpoints of one run, in `folder`."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder, self.keep = folder, keep
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob("*.tmp"):  # of a trainer killed while it wrote
            shutil.rmtree(leftover)

    def save(self, manifest: Manifest, policy: Policy, optimizer: torch.optim.Optimizer) -> Path:
        """Write a checkpoint, unless this version has one, and delete those past `keep`.

        Raises OSError, such as for a full disk: what was there before is still there then.
        """
        final = self.folder / f"v{manifest.version:08d}"
        if (final / MANIFEST).exists():  # a run that was paused where it was resumed
            return final
        unfinished = final.with_suffix(".tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            unfinished.mkdir()
            policy.model.save_pretrained(unfinished)
            save_file(_optimizer_tensors(policy, optimizer), unfinished / OPTIMIZER)
            (unfinished / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2))
            for path in [*unfinished.iterdir(), unfinished]:
                _sync(path)
            unfinished.rename(final)
            _sync(self.folder)
        except SafetensorError as error:  # what safetensors makes of an OSError
            raise OSError(f"{unfinished}: {error}") from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        for old in self._all()[: -self.keep]:
            shutil.rmtree(old)
        return final

    def newest(self) -> tuple[Path, Manifest] | None:
        """The newest checkpoint; None when there is none."""
        found = self._all()
        return (found[-1], Manifest(**json.loads((found[-1] / MANIFEST).read_text()))) if found else None

    def _all(self) -> list[Path]:
        return sorted(path.parent for path in self.folder.glob(f"v*/{MANIFEST}") if path.parent.suffix != ".tmp")


def restore_optimizer(folder: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    """Put the optimiser's moments and the random state of a checkpoint back."""
    tensors = load_file(folder / OPTIMIZER, device=str(policy.device))
    torch.set_rng_state(tensors.pop(RNG).cpu())
    parameters = dict(policy.model.named_parameters())
    for key, tensor in tensors.items():
        name, moment = key.rsplit("/", 1)
        optimizer.state[parameters[name]][moment] = tensor


def _optimizer_tensors(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors = {RNG: torch.get_rng_state()}
    for name, parameter in policy.model.named_parameters():
        for moment, tensor in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{moment}"] = torch.as_tensor(tensor).contiguous()
    return tensors


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def manifest(
    run_id: str, version: int, *, consumed: int, issued: int, knobs: dict[str, Any], control: dict[str, dict[str, float]] | None = None
) -> Manifest:
    return Manifest(run_id=run_id, version=version, consumed=consumed, issued=issued, knobs=knobs, made_at=time.time(), control=control or {})
