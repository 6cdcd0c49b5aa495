"""Measurements of nemo_rao beside what it is compared with. Not part of the package; run from the repository's root."""
