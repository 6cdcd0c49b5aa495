"""Rollouts: responses that the policy in training samples itself, and what is made of them before an update."""
