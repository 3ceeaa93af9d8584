"""Run in a container: tells, as JSON, what a server there can reach, and what of it the jobs of its sandbox can."""

from __future__ import annotations

import inspect
import json
import os
import socket
from typing import Any

from reward_server.sandbox.jobs import Limits, Refused
from reward_server.sandbox.supervisor import CodeSandbox

SECONDS = 60.0
SCRIPTS = ("cat /run/secrets/token", "cat /proc/1/environ", "touch /data/other", "ls /data", "ls /tmp/offbeat*", "env | grep secret")


def read(path):
    with open(path) as file:
        return file.read()


def write(path):
    with open(path, "w") as file:
        return file.write("x")


def listed(path):
    return os.listdir(path)


def connect(port):
    return socket.create_connection(("127.0.0.1", port), 5).fileno()


def connect_unix(path):
    with socket.socket(socket.AF_UNIX) as one:
        one.connect(path)
        return path


WAYS = (read, write, listed, connect, connect_unix)


def main() -> None:
    server, unix = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)
    unix.bind("/data/socket")
    unix.listen()
    os.chmod("/data/socket", 0o777)
    os.mkdir("/tmp/servers")
    os.chmod("/tmp/servers", 0o777)
    aims: dict[Any, tuple[Any, ...]] = {
        read: ("/run/secrets/token", "/proc/1/environ", "/opt/offbeat/pyproject.toml", "/opt/venv/pyvenv.cfg"),
        write: ("/data/seen", "/tmp/servers/seen"),  # jobs may have a /tmp of their own
        listed: ("/tmp/servers", "/data", "/opt/offbeat", "/run/secrets"),
        connect: (server.getsockname()[1],),
        connect_unix: ("/data/socket",),
    }
    told: dict[str, Any] = {"server": [f"{way.__name__} {aim}" for way, these in aims.items() for aim in these if way(aim)]}
    told["tries"] = sum(map(len, aims.values()))
    sandbox = CodeSandbox()
    told["tier"] = sandbox.tier
    with sandbox.open(Limits(seconds=4 * SECONDS)) as session:
        session.load("import os, socket\n" + "\n".join(map(inspect.getsource, WAYS)), seconds=SECONDS)
        replies = {f"{way.__name__} {aim}": session.call(way.__name__, [aim], {}, seconds=SECONDS) for way, these in aims.items() for aim in these}
        told["jobs"] = [what for what, reply in replies.items() if not reply.error]
        told["right"] = session.program("print(6 * 7)", "", seconds=SECONDS).output
    try:
        with sandbox.open(Limits(seconds=4 * SECONDS, commands=True, processes=16)) as session:
            told["programs"] = [script for script in SCRIPTS if session.command(["sh", "-c", script], "", seconds=SECONDS).exit_code == 0]
    except Refused as refused:
        told["refused"] = str(refused)
    sandbox.close()
    told["left"] = [name for name in os.listdir("/tmp") if name != "servers"]
    print(json.dumps(told))


if __name__ == "__main__":
    main()
