"""The models that Offbeat makes itself: a tiny one, shipped, and SmolLM2 out of a package. PyTorch is imported only when one is made."""
