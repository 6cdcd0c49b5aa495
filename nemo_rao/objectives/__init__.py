"""Objectives: pure functions of log-probabilities and rewards, independent of models and parallelism.

``base`` defines objectives, ``registry`` lists them, ``reductions``, ``pairs`` and ``metrics`` hold shared parts, and
every other file contains one objective or a family of them.
"""
