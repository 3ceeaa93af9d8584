"""The verifiers: one file each, and the one registry that names them."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import ValidationError

from reward_server.verifiers import answer_format, exact, instructions, math_answer, reasoning_gym_score, sum_to_target
from reward_server.verifiers.verdict import Options, Verifier

VERIFIERS: dict[str, Verifier] = {
    "math": Verifier(math_answer.MathOptions, math_answer.score, math_answer.JUDGE),
    "sum_to_target": Verifier(sum_to_target.SumOptions, sum_to_target.score),
    "reasoning_gym": Verifier(reasoning_gym_score.ReasoningGymOptions, reasoning_gym_score.score, reasoning_gym_score.JUDGE),
    "exact": Verifier(exact.ExactOptions, exact.score),
    "format": Verifier(answer_format.FormatOptions, answer_format.score),
    "instructions": Verifier(instructions.InstructionOptions, instructions.score),
}


def check_options(name: str, options: dict[str, Any]) -> Options:
    """The options of this verifier, validated. Raises ValueError with what is allowed."""
    if name not in VERIFIERS:
        near = difflib.get_close_matches(name, VERIFIERS, n=1)
        meant = f": did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"there is no verifier {name!r}{meant} Verifiers are {', '.join(VERIFIERS)}")
    model = VERIFIERS[name].options
    try:
        return model.model_validate(options)
    except ValidationError as wrong:
        faults = "; ".join(f"{'.'.join(map(str, error['loc'])) or 'options'}: {error['msg']}" for error in wrong.errors())
        allowed = ", ".join(model.model_fields) or "none"
        raise ValueError(f"options of the verifier {name!r}: {faults}. Options are: {allowed}") from wrong
