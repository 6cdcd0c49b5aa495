"""``nemo-rao demo``, and the data that it makes."""
