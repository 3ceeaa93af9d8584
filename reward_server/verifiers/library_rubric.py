"""`verifiers`: the rubric of an environment of the library `verifiers` judges the completion, where that library is installed.

Versions from 0.1.14 on and before 0.4, which dropped `Rubric`. The environment is loaded once in each worker process and must fit its memory; a
worker can write no file, so what an environment downloads must be in its caches already. A reward function that raises is no score of 0 here, as it
is in the library, but an error; functions that judge a group at once are refused.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import json
import logging
import math
import os
import tempfile
from functools import lru_cache
from typing import Any

from pydantic import Field, JsonValue

from reward_server.verifiers.verdict import Judge, LimitedOptions, Tools, Unjudged, Verdict
from services.contracts.messages import Outcome

PACKAGE = "verifiers>=0.1.14,<0.4"
ARROW = {"JE_ARROW_MALLOC_CONF": "background_thread:false", "ARROW_DEFAULT_MEMORY_POOL": "system"}
"""For pyarrow, which the library imports: no thread, since workers are forked, and no gigabyte of their address space."""


class LibraryOptions(LimitedOptions):
    environment: str = Field(max_length=200, pattern=r"^[A-Za-z0-9_./-]+(:load_environment[A-Za-z0-9_]*)?$")
    """Id of an installed environment, such as `gsm8k`; or `module:load_environment_NAME`, a function that gives an environment."""
    args: dict[str, JsonValue] = Field(default_factory=dict)
    """Arguments of the environment."""


def score(text: str, *, prompt: str, answer: JsonValue, options: LibraryOptions, tools: Tools) -> Verdict:
    """The rubric's reward: the weighted sum of its functions. An answer with `answer` and `info` is a row of the environment's data set."""
    if not installed():
        raise Unjudged(Outcome.ERROR, f"the library is not installed on this reward server: pip install '{PACKAGE}'", cause="library")
    row: JsonValue = answer if isinstance(answer, dict) and "answer" in answer else {"answer": answer, "info": {}}
    request: JsonValue = {"environment": options.environment, "args": options.args, "prompt": prompt, "completion": text, "row": row}
    reply = tools.ask("verifiers", request)
    if not isinstance(reply, dict) or not isinstance(reward := reply.get("reward"), float):
        raise Unjudged(Outcome.ERROR, str(reply), cause="library")
    return Verdict(reward, detail=str(reply.get("metrics", ""))[:300])


def installed() -> bool:
    return importlib.util.find_spec("verifiers") is not None


def _warm() -> None:
    """Imports what any environment needs: seconds that a worker would spend again and again."""
    if installed():
        os.environ.update(ARROW)
        tempfile.gettempdir()  # what the library imports asks for it, and a worker, which can write no file, would find none
        getattr(importlib.import_module("verifiers"), "SingleTurnEnv", None)  # imported when first asked for


@lru_cache(8)
def _rubric(environment: str, args: str) -> Any:
    """Of the environment; loaded once in each worker."""
    module, _, function = environment.partition(":")
    if function:
        made = getattr(importlib.import_module(module), function)(**json.loads(args))
    else:
        made = importlib.import_module("verifiers.utils.env_utils").load_environment(environment, **json.loads(args))
    return made.rubric


def _decide(request: dict[str, Any]) -> JsonValue:
    """`{"reward": ..., "metrics": ...}`, or a sentence that says why there cannot be one. Runs in a worker only."""
    try:
        rubric = _rubric(request["environment"], json.dumps(request["args"], sort_keys=True))
    except Exception as wrong:  # an environment raises whatever it raises
        return f"the environment {request['environment']!r} cannot be loaded: {type(wrong).__name__}: {wrong}"[:300]
    messages = [{"role": "user", "content": request["prompt"]}]
    row = {"prompt": messages, "example_id": 0, "task": "", **request["row"]}
    state = importlib.import_module("verifiers.types").State(
        {**row, "input": row, "completion": [{"role": "assistant", "content": request["completion"]}], "trajectory": [], "is_completed": True}
    )
    with _Complaints() as complaints:
        try:
            asyncio.run(rubric.score_rollout(state))
        except Exception as wrong:
            return f"the rubric raised {type(wrong).__name__}: {wrong}"[:300]
    if complaints.texts:
        return f"a reward function raised: {complaints.texts[0]}"[:300]
    reward = float(state["reward"])
    return {"reward": reward, "metrics": dict(state.get("metrics") or {})} if math.isfinite(reward) else f"the rubric gave {reward}"


class _Complaints(logging.Handler):
    """What the library logs as an error, where it gives 0 for a function that raised."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())

    def __enter__(self) -> _Complaints:
        logging.getLogger("verifiers").addHandler(self)
        return self

    def __exit__(self, *exc: object) -> None:
        logging.getLogger("verifiers").removeHandler(self)


JUDGE = Judge(warm=_warm, decide=_decide, seconds=10.0, patience=4.0)
