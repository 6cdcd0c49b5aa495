"""Rollouts: responses sampled from the policy in training, and their processing before an update."""
