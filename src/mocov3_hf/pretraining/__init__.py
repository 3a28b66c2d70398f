"""Pre-training with MoCo v3, from a recipe to a folder of weights."""
