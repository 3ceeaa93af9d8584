"""Makes math-verify's LaTeX parser remember its hard choices: two to three times as many answers a second.

Nearly all the time of judging a short answer goes to ANTLR's prediction with full context (Parr, Harwell and Fisher 2014, "Adaptive LL(*) Parsing"),
which ANTLR does anew for each text. What it comes to depends on the decision, the rules that are open, the precedence in force (the only predicates
of that grammar) and the kinds of the tokens ahead, and on nothing else: it is kept under all of these. Answers of one shape, such as those of one
group, then cost it once. No verdict changes (tests/integration/test_latex_predictions.py).
"""

from __future__ import annotations

from typing import Any

KEPT = 20_000
"""Choices, of 3 KB at most; a worker is replaced before it knows that many of ordinary answers."""
LONGEST = 400
"""Tokens ahead; longer texts are parsed as ever."""


def remember() -> None:
    """For the rest of this process, which must be a worker's."""
    from antlr4.atn.ParserATNSimulator import ParserATNSimulator
    from latex2sympy2_extended import latex2sympy2

    known: dict[tuple[Any, ...], int] = {}
    hard: set[int] = set()
    """Decisions that have needed the full context."""

    class Predictions(ParserATNSimulator):
        kinds: tuple[int, ...] | None = None

        def adaptivePredict(self, tokens: Any, decision: int, context: Any) -> int:
            if decision not in hard:
                return int(super().adaptivePredict(tokens, decision, context))
            if self.kinds is None:
                self.kinds = _kinds(tokens.tokenSource)
            ahead = self.kinds[tokens.index :]
            if not 0 < len(ahead) <= LONGEST:
                return int(super().adaptivePredict(tokens, decision, context))
            key = (decision, self.parser._precedenceStack[-1], _open_rules(context), ahead)
            if key not in known:
                if len(known) >= KEPT:
                    known.clear()
                known[key] = int(super().adaptivePredict(tokens, decision, context))  # raises where nothing fits, which is not kept
            return known[key]

        def execATNWithFullContext(self, dfa: Any, *rest: Any) -> Any:
            hard.add(dfa.decision)
            return super().execATNWithFullContext(dfa, *rest)

    class Parser(latex2sympy2.PSParser):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self._interp = Predictions(self, self.atn, self.decisionsToDFA, self.sharedContextCache)

    latex2sympy2.PSParser = Parser


class _NoTokens(Exception):
    """A part of the text is no token."""


def _kinds(lexer: Any) -> tuple[int, ...]:
    """Of all tokens of the text: the parser's own stream reads them only as it needs them, and complaints are its own to make.

    Empty for a text that has parts which are no tokens.
    """
    from antlr4 import CommonTokenStream, InputStream
    from antlr4.error.ErrorListener import ErrorListener

    class Complaints(ErrorListener):
        def syntaxError(self, *about: Any) -> None:
            raise _NoTokens

    again = type(lexer)(InputStream(lexer.inputStream.strdata))
    again.removeErrorListeners()
    again.addErrorListener(Complaints())
    tokens = CommonTokenStream(again)
    try:
        tokens.fill()
    except _NoTokens:
        return ()
    return tuple(token.type for token in tokens.tokens)


def _open_rules(context: Any) -> tuple[int, ...]:
    states = []
    while context is not None:
        states.append(context.invokingState)
        context = context.parentCtx
    return tuple(states)
