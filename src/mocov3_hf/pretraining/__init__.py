"""Pre-training: from a recipe to a folder of weights."""
