"""From terms of tokens to one number of a mini-batch."""

from __future__ import annotations

from torch import Tensor

from services.contracts.algorithms import Normaliser
from trainer.tokens import Tokens


def normalised(values_T: Tensor, tokens: Tokens, normaliser: Normaliser, *, max_tokens: int) -> Tensor:
    """Scalar; 0 where there is no token.

    token:     sum / trained tokens                       (DAPO, arXiv 2503.14476)
    sequence:  mean over completions of their means       (GRPO, arXiv 2402.03300)
    constant:  sum / (completions * max_tokens)           (Dr. GRPO, arXiv 2503.20783)
    """
    match normaliser:
        case Normaliser.TOKEN:
            return values_T.sum() / max(tokens.count, 1)
        case Normaliser.SEQUENCE:
            return tokens.row_mean(values_T).sum() / max(tokens.rows, 1)
        case Normaliser.CONSTANT:
            return values_T.sum() / max(tokens.rows * max_tokens, 1)
