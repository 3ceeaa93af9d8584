"""`offbeat init`: what compose.yaml needs before the first `docker compose up`: secrets in files, and .env."""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path
from typing import Annotated

import typer

from services.cli.output import AsJson, print_json, say
from services.cli.session import ROOT, Code, Failure, Session

SECRETS = ("token", "cluster-token", "redis-password", "grafana-password")
OVERLAYS = {0: "compose.cpu.yaml", 1: "compose.gpu-1.yaml", 2: None, 4: "compose.gpu-4.yaml", 8: "compose.gpu-8.yaml"}
"""By number of GPUs: the file that is laid over compose.yaml."""
MOUNTED = ("deploy/prometheus", "deploy/grafana")
"""Folders that compose.yaml mounts into containers, which read them under user ids of their own."""


def init(
    ctx: typer.Context,
    gpus: Annotated[int, typer.Option(help="GPUs to use: 0, 1, 2, 4 or 8.")] = 2,
    folder: Annotated[Path, typer.Option(help="Folder of compose.yaml, where .env, secrets/ and models/ are made.")] = Path(),
    as_json: AsJson = False,
) -> None:
    """Prepare `docker compose up`: make secrets and .env.

    What is there already stays as it is.

    Example: offbeat init --gpus 4
    """
    session: Session = ctx.obj
    if gpus not in OVERLAYS:
        raise Failure(f"--gpus {gpus}: there are compose files for {', '.join(map(str, OVERLAYS))}", code=Code.USAGE)
    made = [path for name in SECRETS if make_secret(path := folder / "secrets" / name)]
    (folder / "models").mkdir(exist_ok=True)
    let_all_read(folder / "models")
    for name in MOUNTED:
        for path in [folder / name, *(folder / name).rglob("*")]:
            let_all_read(path)
    environment = folder / ".env"
    if not environment.exists():
        environment.write_text(for_gpus((ROOT / ".env.example").read_text(), gpus))
        made.append(environment)
    if as_json:
        print_json(session.out, {"made": made})
    else:
        for path in made:
            say(session.out, f"made {path}")
        say(session.out, "now: docker compose up -d --wait" if made else "all was there already: docker compose up -d --wait")


def make_secret(path: Path) -> bool:
    """Write 32 random bytes as text, unless the file is there; whether it was written.

    Containers read it under another user id, so everybody may: its folder is what keeps others of this machine out.
    """
    path.parent.mkdir(mode=0o700, exist_ok=True)
    path.parent.chmod(0o700)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return False
    with open(descriptor, "w") as file:
        file.write(secrets.token_urlsafe(32) + "\n")
    path.chmod(0o444)
    return True


def let_all_read(path: Path) -> None:
    """What was made under umask 077 only its owner may read. What is not there is passed over."""
    if path.exists():
        mode = path.stat().st_mode
        readable = mode | (0o555 if path.is_dir() else 0o444)
        if readable != mode:
            path.chmod(readable)


def for_gpus(example: str, gpus: int) -> str:
    """.env of the example for so many GPUs."""
    overlay = OVERLAYS[gpus]
    files = "compose.yaml" if overlay is None else f"compose.yaml:{overlay}"
    return re.sub(r"^COMPOSE_FILE=.*$", f"COMPOSE_FILE={files}", example, flags=re.MULTILINE)
