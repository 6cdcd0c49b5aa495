"""What is optimised, as pure functions of sequence log-probabilities and rewards. Knows no model and no parallelism.

``base`` says what an objective is, ``registry`` lists them, ``reductions`` ``pairs`` ``metrics`` hold what they share,
and every other file is one objective.
"""
