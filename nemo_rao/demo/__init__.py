"""``nemo-rao demo``, and the data that it generates."""
