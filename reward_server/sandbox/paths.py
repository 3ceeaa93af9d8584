"""Which files a job may read: this interpreter, its libraries, and the tool chain where commands are allowed. Standard library only."""

from __future__ import annotations

import os
import sysconfig
from typing import NamedTuple

DEVICES = ("null", "zero", "urandom", "random")
TOOL_CHAIN = ("/usr", "/etc/alternatives", "/etc/ld.so.cache")
LOADER = "/etc/ld.so.cache"
LINKS = ("/bin", "/sbin", "/lib", "/lib32", "/lib64")
"""Links into /usr on most systems, folders on others."""


class Readable(NamedTuple):
    """Real paths; none lies below another of the same list."""

    job: list[str]
    """For every job."""
    hidden: list[str]
    """Folders below those that are not to be read: installed packages."""
    tools: list[str]
    """For jobs with commands, beside the others."""


def readable(site: str, packages: tuple[str, ...], *, tools: bool) -> Readable:
    """Of this process, once it has loaded what jobs may import: the folders of all libraries in its memory are among them."""
    standard = [os.path.realpath(sysconfig.get_path(which)) for which in ("stdlib", "platstdlib")]
    hidden = [f"{folder}/{name}" for folder in standard for name in ("site-packages", "dist-packages")] + ["/usr/lib/python3/dist-packages"]
    with open("/proc/self/maps") as maps:
        mapped = {line.split(maxsplit=5)[5].strip() for line in maps if ".so" in line and "/" in line}
    libraries = {os.path.dirname(path) for path in mapped if not path.startswith((f"{os.path.realpath(site)}/", *(f"{h}/" for h in hidden)))}
    wanted = [f"{os.path.realpath(site)}/{name}" for name in os.listdir(site) if name.split(".")[0] in packages] if packages else []
    job = outermost([*standard, *libraries, LOADER])
    hidden = sorted({h for h in hidden if os.path.isdir(h) and any(h.startswith(f"{folder}/") for folder in job)})
    return Readable(job + wanted, hidden, outermost([*TOOL_CHAIN, *(x for x in LINKS if not os.path.islink(x))]) if tools else [])


def outermost(paths: list[str]) -> list[str]:
    """Those that exist and do not lie below another."""
    there = sorted({os.path.realpath(path) for path in paths if os.path.exists(path)})
    return [path for path in there if not any(path.startswith(f"{other}/") for other in there)]


def around(folder: str, hidden: list[str]) -> list[str]:
    """What is in the folder, as few paths as cover all but the hidden ones."""
    if folder in hidden:
        return []
    if not any(path.startswith(f"{folder}/") for path in hidden):
        return [folder]
    return [path for entry in sorted(os.listdir(folder)) for path in around(f"{folder}/{entry}", hidden)]
