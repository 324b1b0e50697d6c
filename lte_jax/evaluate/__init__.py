"""Evaluation: held-out loss and recall by distance, cached accuracy on generated tasks, the harness."""
