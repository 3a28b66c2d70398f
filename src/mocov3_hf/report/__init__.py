"""HTML reports about a run or a model: training curves, results, and what the model sees in images."""
