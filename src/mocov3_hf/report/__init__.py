"""What a run or a model looks like, on one page: curves, results, and what the features see in images."""
