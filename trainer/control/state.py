"""What a controller remembers between steps."""

from __future__ import annotations

State = dict[str, float]
"""Finite numbers by name, kept in the checkpoint's manifest. Settings are no part of it: those in force are given at each call, so that a turned knob
acts at once. A name that is missing starts anew. No function changes a state that it is given."""
