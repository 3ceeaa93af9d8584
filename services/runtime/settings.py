"""What a process must know to start, from environment variables with the prefix OFFBEAT_. A run's settings are in its spec instead."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Literal
from urllib.parse import quote, urlsplit

from pydantic import Field, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from services.runtime.redaction import hide

REFUSED_TOKENS = frozenset({"", "changeme", "secret", "token", "password"})
EVERYWHERE = frozenset({"0.0.0.0", "::"})
"""Addresses to listen on that nobody can be reached at."""


class MissingSecret(ValueError):
    """A token that the process cannot start without."""


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="OFFBEAT_", frozen=True, extra="ignore", use_attribute_docstrings=True, hide_input_in_errors=True)

    redis_password_file: Path | None = None
    """File with the password of Redis, for a `redis_url` without one."""
    redis_url: str = Field("redis://127.0.0.1:6379/0", validate_default=True, repr=False)
    """Redis (7.0 or newer) or Valkey, with its password: redis://:PASSWORD@HOST:PORT/0."""
    host: str = "127.0.0.1"
    """Address that the process listens on."""
    advertise: str | None = Field(None, validate_default=True)
    """Address at which other processes reach it; default: `host`, or the name of the machine where it listens on all addresses."""
    port: int = Field(8700, ge=1, le=65535)
    token_file: Path | None = None
    """File with the bearer token of the public API."""
    cluster_token_file: Path | None = None
    """File with the bearer token that processes of the fleet use among themselves."""
    data: Path = Path("runs")
    """Folder of checkpoints, snapshots and reports, shared by all processes of a run."""
    member: str = Field(default_factory=lambda: f"{socket.gethostname()}-{os.getpid()}")
    """Fleet id of this process."""
    max_sequences: int = Field(128, ge=2)
    """Sequences that a rollout server generates at once."""
    kv_cache_bytes: int | None = Field(None, ge=1)
    """Size of a rollout server's KV cache; default: on a GPU most of the card, as vLLM decides, on CPU room for all sequences."""
    reward_threads: int = Field(16, ge=1)
    """Completions that a reward server judges at once. A thread mostly waits: what works at once is bounded by the judges and the sandbox."""
    reward_workers: int = Field(default_factory=lambda: max(2, len(os.sched_getaffinity(0))), ge=1)
    """Worker processes of each judge of a reward server; default: one a core, two at least."""
    reward_waiting: int = Field(1024, ge=1)
    """Completions that may wait to be judged for HTTP requests; those beyond are answered with 429."""
    sandbox_outer: bool = False
    """Declares that the reward server itself runs in a sandbox (gVisor, Kata), so that it may run untrusted code where the kernel has no Landlock."""
    remote_key_file: Path | None = None
    """File with the key that requests of the verifier `remote` are signed with; without one they are not."""
    remote_networks: tuple[str, ...] = ()
    """Networks beside the public internet to which the verifier `remote` may connect, as JSON: ["10.0.0.0/8"]."""
    weight_transport: Literal["shm", "gloo", "nccl"] = "shm"
    """How a trainer sends weights in runs that do not say: shared memory needs servers on its machine, NCCL a GPU for each of them."""
    trainer_run: str | None = None
    """The only run that a trainer takes; it ends once that run wants no trainer. Default: one run after another."""
    trainer_job_template: Path | None = None
    """Manifest of a Kubernetes Job, of which the control plane makes one for each run that wants a trainer; default: it makes none."""
    trainer_jobs: int = Field(1, ge=0)
    """Such Jobs that may be active at the same time."""
    trainer_ranks: int = Field(1, ge=1)
    """Processes, a GPU each, that `trainer.launch` lets one trainer be."""
    rollout_servers: int = Field(0, ge=0)
    """Rollout servers, a GPU each, that `trainer.launch` starts beside the trainer."""
    ray_address: str = "local"
    """Ray cluster of `trainer.launch`: `local` starts one on this machine, `auto` joins the one that runs here, HOST:PORT the one there."""
    rank_gpus: int | None = Field(None, ge=0, le=1)
    """GPUs of each rank and each rollout server that `trainer.launch` starts; default: one where the Ray cluster has any when it is joined."""
    rank_timeout: float = Field(600.0, gt=0)
    """Seconds after which a rank gives up waiting for the others: in loading a model, or in one collective of the model's maths."""
    rank_restarts: int = Field(3, ge=0)
    """How often in a row `trainer.launch` starts the ranks again when they break and the run gets no further."""
    rank_grace: float = Field(60.0, gt=0)
    """Seconds that `trainer.launch` gives its ranks, once it is asked to end, to write a checkpoint and end too."""
    log_level: str = "INFO"
    ship_logs: Literal["DEBUG", "INFO", "WARNING", "ERROR", "OFF"] = "INFO"
    """Level from which on the log goes to Redis too, for the API and the page; OFF: none of it."""

    @field_validator("redis_url")
    @classmethod
    def _with_password(cls, url: str, info: ValidationInfo) -> str:
        path = info.data.get("redis_password_file")
        if path is None:
            hide(urlsplit(url).password or "")
            return url
        parts = urlsplit(url)
        user, at, address = parts.netloc.rpartition("@")
        if at and ":" in user:
            raise ValueError("the address of Redis holds a password, and OFFBEAT_REDIS_PASSWORD_FILE names another: give one of them")
        return parts._replace(netloc=f"{user}:{quote(_secret('OFFBEAT_REDIS_PASSWORD_FILE', path), safe='')}@{address}").geturl()

    @field_validator("advertise")
    @classmethod
    def _reachable(cls, address: str | None, info: ValidationInfo) -> str | None:
        return socket.gethostname() if address is None and info.data.get("host") in EVERYWHERE else address

    @property
    def url(self) -> str:
        return f"http://{self.advertise or self.host}:{self.port}"

    @property
    def token(self) -> str:
        return _secret("OFFBEAT_TOKEN_FILE", self.token_file)

    @property
    def cluster_token(self) -> str:
        return _secret("OFFBEAT_CLUSTER_TOKEN_FILE", self.cluster_token_file)

    @property
    def remote_key(self) -> str | None:
        return None if self.remote_key_file is None else _secret("OFFBEAT_REMOTE_KEY_FILE", self.remote_key_file)


def _secret(name: str, path: Path | None) -> str:
    if path is None:
        raise MissingSecret(f"{name} is not set: name a file that holds a token (`offbeat up` makes one; there is no default)")
    try:
        token = path.read_text().strip()
    except OSError as error:
        raise MissingSecret(f"{name}: cannot read {path}: {error.strerror}") from error
    if token in REFUSED_TOKENS or len(token) < 16:
        raise MissingSecret(f"{name}: {path} holds no usable token: at least 16 characters, and no sample value")
    hide(token)
    return token
