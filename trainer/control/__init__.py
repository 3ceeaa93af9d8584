"""Controllers: they read what a step measured and turn what weighs in the next one. Pure functions over a state that goes into the checkpoint."""
