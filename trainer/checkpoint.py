"""Checkpoints: weights in Hugging Face format, the optimiser's moments and random state in safetensors, and a manifest. No pickles.

A checkpoint is written beside its place and renamed into it, so that what can be seen is whole. The newest one there is the one to resume from.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from trainer.orders import Moments
from trainer.policy import Policy
from trainer.sharding import share_like, whole

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
        weights, moments = gather(policy, optimizer)
        try:
            unfinished.mkdir()
            policy.model.save_pretrained(unfinished, state_dict=weights)
            save_file(moments, unfinished / OPTIMIZER)
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
    parameters = dict(policy.model.named_parameters())
    with safe_open(folder / OPTIMIZER, framework="pt", device=str(policy.device)) as file:
        for key in file.keys():  # noqa: SIM118  # no mapping
            tensor = file.get_tensor(key)  # one at a time: of each a rank keeps its share only
            if key == RNG:
                torch.set_rng_state(tensor.cpu())
                continue
            name, moment = key.rsplit("/", 1)
            optimizer.state[parameters[name]][moment] = share_like(parameters[name], tensor)


def gather(policy: Policy, optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor] | None, dict[str, torch.Tensor]]:
    """Weights and optimiser as a checkpoint keeps them, whatever the number of ranks: whole. No weights where the model itself has them whole.

    A common act of all ranks, whose result is rank 0's: the others let each tensor go at once.
    """
    moments = {RNG: torch.get_rng_state()}
    if policy.ranks.world == 1:
        return None, moments | {f"{name}/{moment}": value.contiguous() for name, moment, value in optimizer_tensors(policy, optimizer)}
    weights: dict[str, torch.Tensor] = {}
    with policy.ranks.together(Moments()):
        for name, weight in policy.weights(torch.float32):
            if not policy.ranks.rank:
                weights[name] = weight.cpu()
        for name, moment, value in optimizer_tensors(policy, optimizer):
            if not policy.ranks.rank:
                moments[f"{name}/{moment}"] = value.cpu().contiguous()
    return weights, moments


def optimizer_tensors(policy: Policy, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Parameter, moment and value of everything that the optimiser keeps, each whole."""
    for name, parameter in policy.model.named_parameters():
        for moment, value in optimizer.state.get(parameter, {}).items():
            yield name, moment, whole(torch.as_tensor(value))


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
