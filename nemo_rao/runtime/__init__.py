"""Processes, console and files: what a run needs of the machine, whatever is trained."""
