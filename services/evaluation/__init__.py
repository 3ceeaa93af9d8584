"""Measures of a policy's answers to the prompts of an evaluation set: pure functions, without torch."""
