"""Processes, console and files: services of the machine, independent of what is trained."""
