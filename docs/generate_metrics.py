"""Writes docs/metrics.md out of the catalogue of what is measured: `.venv/bin/python docs/generate_metrics.py`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from services.contracts.measures import AT_KL, BINNED, BINS, EVALUATION_KEYS, REDUCERS, RUN_KEYS, STEP_KEYS

TARGET = Path(__file__).with_name("metrics.md")

HEAD = """\
# What is measured

<!-- Generated: change services/contracts/measures.py, then run `.venv/bin/python docs/generate_metrics.py`. -->

A name ends with its unit where it has one: `_nats`, `_share` (of 1), `_seconds`, `_tokens`, `_versions`. A value that nothing was measured for is
left out. Formulas: `trainer/measures/`, `trainer/entropy.py`, `services/evaluation/`. `python -m benchmarks.measures` shows what each costs.

A claim of a study names `steps.KEY.REDUCER`, `evaluation.SET.KEY.REDUCER` or `run.KEY`.
"""


def render() -> str:
    return "\n".join(
        [
            HEAD,
            "## Of a step\n",
            "`values` of a step, and `offbeat_trainer_step{name=..., by=..., bin=...}`. Means run over the trained tokens of all updates of the",
            "step, each under the policy that its update started from.\n",
            table(("key", "meaning", "divided by"), ((f"`{key}`", meaning, ", ".join(BINNED.get(key, ()))) for key, meaning in STEP_KEYS.items())),
            "## Ways to divide\n",
            "A key that is divided has a value for each bin too, such as `entropy_nats/lag/2-3`. `position` is the decile of the place in the",
            "completion, `entropy` the fifth of the update's token entropies.\n",
            table(("by", "bins"), ((f"`{by}`", ", ".join(f"`{name}`" for name in names)) for by, names in BINS.items())),
            "## Of an evaluation\n",
            "`values` of an evaluation, and `offbeat_evaluation{set=..., domain=..., name=...}`.\n",
            listed(EVALUATION_KEYS),
            "## Of a run\n",
            listed(RUN_KEYS),
            "## Reducers\n",
            "How a curve becomes a number.\n",
            table(("reducer", "meaning"), ((f"`{name}`", meaning) for name, meaning in (*REDUCERS.items(), ("at_kl_Nm", AT_KL)))),
        ]
    )


def listed(keys: Mapping[str, str]) -> str:
    return table(("key", "meaning"), ((f"`{key}`", meaning) for key, meaning in keys.items()))


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    columns = list(head)
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines) + "\n"


if __name__ == "__main__":
    TARGET.write_text(render())
