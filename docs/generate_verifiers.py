"""Writes docs/verifiers.md out of the registry of verifiers: `.venv/bin/python docs/generate_verifiers.py`."""

from __future__ import annotations

import inspect
import json
import re
import runpy
import sys
from pathlib import Path

from reward_server.verifiers import VERIFIERS
from reward_server.verifiers.code.languages import LANGUAGES, Commands
from reward_server.verifiers.math_decisions import DECISIONS
from reward_server.verifiers.verdict import Example
from services.contracts.spec import Verifier as VerifierSpec

TARGET = Path(__file__).with_name("verifiers.md")
SPEC = runpy.run_path(str(Path(__file__).with_name("generate_run_spec.py")))
table = SPEC["table"]

HEAD = """\
# Verifiers

<!-- Generated: change reward_server/verifiers, then run `.venv/bin/python docs/generate_verifiers.py`. -->

A run's `rewards` name verifiers. The reward of a completion is the weighted sum of their scores:

```toml
[[rewards]]
name = "format"
options = { boxed = true }
gate = 1.0            # without exactly one box the reward is -0.5, and nothing else is asked
gate_reward = -0.5

[[rewards]]
name = "math"

[[rewards]]
name = "length"
weight = 0.2
options = { unit = "words", most = 300, fade = 300 }
```

"""

OUTCOMES = """\
Gates are decided first, those of cheap verifiers before those that need a process of their own; the first that is not passed decides alone.
`offbeat reward score` and `POST /v1/score` show the breakdown: for each verifier its score, outcome, cause, detail, milliseconds, and the tier of the
sandbox where code was run.

| outcome | what it means | score |
|---|---|---|
| `ok` | judged | yes |
| `timeout` | not judged in time; of `code`: the solution ran out of time | none but with `timeout_score`; of `code`: yes |
| `limit:WHICH` | the same for `memory`, `cpu`, `output`, `files`, `processes`, or `input` for a text too long to be looked at | the same |
| `error:WHERE` | a fault of `verifier`, `judge`, `sandbox`, `tool_chain`, `library` or `remote` | none |
| `unverifiable` | the gold answer makes no sense to this verifier | none |

A completion without a score has no reward: never 0 in its place. Its group is tried again, on another server if there is one, and after
`max_attempts` tries goes to the dead letters. A wrong, empty or senseless completion is judged, and scores 0.
"""

EXTRA: dict[str, str] = {
    "code": """\
Records and what becomes of them:

| record | tests |
|---|---|
| `{"function": "f", "calls": [{"args": [1], "kwargs": {"b": 2}, "expected": 3}]}` | a call each; a method is written `"Class.method"` |
| `{"programs": [{"stdin": "1 2", "stdout": "3"}]}` | a run each |
| HumanEval: `test`, `entry_point`, `prompt` | one, or an assert each where `check` has only calls with literals; the solution may be the body alone |
| MBPP, full or sanitised: `test_list`, `challenge_test_list`, `test_setup_code`, `test_imports` | an assert each |
| LiveCodeBench: `public_test_cases`, `private_test_cases` (JSON or packed), `metadata` | a call or a run each |
| APPS, TACO: `input_output`, or `inputs`, `outputs`, `fn_name` | a call or a run each |
| CodeContests: `public_tests`, `private_tests`, `generated_tests` | a run each |

`"solution"` in an own record, and the reference solutions of the others, are what `offbeat reward check` tries. Tests of expected tuples or sets,
which JSON has none of, are written as asserts: `{"test_list": ["assert f(2) == (1, {2})"]}`. Asserts that are more than a call with literals are run
in a session of their own, which the solution never gets into; its calls are relayed. Values are compared as Python's `==` does, save that NaN equals
NaN; output is compared line by line without white space at the ends. The data sets' own judges also take `1.0` for `1` there: so does a `tolerance`.

Languages beside Python, where their tool chain is installed on the reward server: LANGUAGES. Others by `commands`:

COMMANDS
""",
    "remote": """\
The signature is `X-Offbeat-Signature: sha256=HEX`, with HEX the HMAC-SHA256 of `X-Offbeat-Timestamp`, a full stop and the body, under the key in the
file that `OFFBEAT_REMOTE_KEY_FILE` of the reward server names. A service checks it so, and refuses times that are minutes old:

```python
expected = "sha256=" + hmac.new(key, timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()
ok = hmac.compare_digest(expected, signature) and abs(time.time() - int(timestamp)) < 300
```

A reply has at most 1 MiB, uncompressed, and is there in whole within `seconds`. Only addresses of the public internet are connected to;
`OFFBEAT_REMOTE_NETWORKS='["10.0.0.0/8"]'` allows others. Redirects are not followed. After 5 failures in a row a service is left alone for 30 s.
""",
}


def render() -> str:
    rubric = {name: field for name, field in VerifierSpec.model_fields.items() if name != "options"}
    parts = [HEAD + table(rubric), OUTCOMES]
    for name, verifier in VERIFIERS.items():
        fields = verifier.options.model_fields
        parts += [f"## {name}\n", about(name), table(fields) if fields else "No options.\n"]
        parts += [decisions()] if name == "math" else [extra(name)] if name in EXTRA else []
        parts += ["Examples:\n" if len(verifier.examples) > 1 else "Example:\n", examples(verifier.examples)]
    return "\n".join(parts)


def about(name: str) -> str:
    """The docstring of the verifier's module, without its name in front."""
    module = sys.modules[VERIFIERS[name].score.__module__]  # type: ignore[attr-defined]
    text = inspect.cleandoc(module.__doc__ or "")
    return re.sub(rf"^`{name}`: (.)", lambda found: found[1].upper(), text) + "\n"


def extra(name: str) -> str:
    languages = ", ".join(f"`{language}` ({one.install.partition(' (')[0]})" for language, one in LANGUAGES.items())
    return EXTRA[name].replace("LANGUAGES", languages).replace("COMMANDS\n", table(Commands.model_fields))


def examples(given: tuple[Example, ...]) -> str:
    rows = ["| options | answer | completion | score |", "|---|---|---|---|"]
    for one in given:
        options = ", ".join(f"`{key} = {json.dumps(value)}`" for key, value in one.options.items())
        rows.append(f"| {cell(options)} | {code(one.answer)} | {code(one.completion)} | {one.score:g} |")
    return "\n".join(rows) + "\n"


def decisions() -> str:
    rows = ["What may surprise, decided on purpose:\n", "| about | gold answer | answer | verdict | why |", "|---|---|---|---|---|"]
    for one in DECISIONS:
        said = ("right" if one.right else "wrong") + (" (a mistake)" if one.mistake else "")
        rows.append(f"| {one.topic} | `{cell(one.gold)}` | `{cell(one.answer)}` | {said} | {one.why} |")
    return "\n".join(rows) + "\n"


def code(value: object) -> str:
    """A value in a cell: a text as it is, line breaks shown as such; anything else as JSON."""
    text = value.replace("\n", "\u23ce") if isinstance(value, str) else json.dumps(value)
    ticks = "``" if "`" in text else "`"
    fence = "````" if "```" in text else ticks
    return f"{fence} {cell(text)} {fence}" if "`" in text else f"`{cell(text)}`"


def cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    TARGET.write_text(render())
