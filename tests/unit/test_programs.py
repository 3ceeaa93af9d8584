import os

import pytest

from services.local.programs import KEPT, ProgramFailed, run_module

WORDS = """
import sys
for n in range(int(sys.argv[1])):
    print("line", n, file=sys.stderr, flush=True)
print("not told")
sys.exit(int(sys.argv[2]))
"""
ENDLESS = """
import os, sys, time
print(os.getpid(), file=sys.stderr, flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def programs(tmp_path, monkeypatch):
    (tmp_path / "words.py").write_text(WORDS)
    (tmp_path / "endless.py").write_text(ENDLESS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def test_progress_is_told_line_by_line():
    told = []
    run_module("words", "3", "0", progress=told.append)
    assert told == ["line 0", "line 1", "line 2"]


def test_a_failure_has_the_programs_last_words():
    with pytest.raises(ProgramFailed) as failed:
        run_module("words", "100", "1", progress=lambda line: None)
    assert str(failed.value).splitlines() == [f"line {n}" for n in range(100 - KEPT, 100)]
    with pytest.raises(ProgramFailed, match="words ended with status 3"):
        run_module("words", "0", "3", progress=lambda line: None)


def test_what_interrupts_the_command_ends_the_program():
    def stop(line: str) -> None:
        raise KeyboardInterrupt(line)

    with pytest.raises(KeyboardInterrupt) as interrupted:
        run_module("endless", progress=stop)
    with pytest.raises(ProcessLookupError):
        os.kill(int(str(interrupted.value)), 0)
