"""How programs of other languages than Python are built and run, in the same sandbox."""

from __future__ import annotations

import shutil
from typing import Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

Argv = Annotated[tuple[str, ...], Field(min_length=1, max_length=100)]


class Commands(BaseModel):
    """A language by its commands, run in a working folder of their own. Programs are looked up in the sandbox's path."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    file: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,100}$")
    """Name of the file that the solution is written to."""
    build: tuple[Argv, ...] = ()
    """Commands before the first test, such as a compiler's."""
    run: Argv
    """The command of a test, which reads its standard input."""
    tags: tuple[str, ...] = ()
    """Languages of fenced code blocks that are such solutions."""


class Language(NamedTuple):
    commands: Commands
    install: str
    """What to install where its tool chain is missing."""


LANGUAGES: dict[str, Language] = {
    "cpp": Language(
        Commands(file="main.cpp", build=(("g++", "-O2", "-std=c++17", "-o", "main", "main.cpp"),), run=("./main",), tags=("cpp", "c++", "cc", "cxx")),
        "the compiler g++ (Debian: apt-get install g++)",
    ),
    "c": Language(
        Commands(file="main.c", build=(("gcc", "-O2", "-std=c11", "-o", "main", "main.c", "-lm"),), run=("./main",), tags=("c",)),
        "the compiler gcc (Debian: apt-get install gcc)",
    ),
    "javascript": Language(
        Commands(file="main.js", run=("node", "main.js"), tags=("javascript", "js", "node")), "Node.js (Debian: apt-get install nodejs)"
    ),
}


def missing(commands: Commands) -> list[str]:
    """Programs that the commands start and this machine has not."""
    started = [argv[0] for argv in (*commands.build, commands.run)]
    return sorted({program for program in started if not program.startswith("./") and shutil.which(program) is None})
