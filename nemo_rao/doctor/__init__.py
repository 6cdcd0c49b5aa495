"""``nemo-rao doctor``: what works on this machine, what does not, and why.

Nothing heavy is imported in the command's own process, so that a broken package is reported like any other.

    inside              imports of packages, each run in a process of its own
    probes              starts them, and says what became of each
    packages            versions, those that the plugin asks for, and NVIDIA's apex told from another package
    abilities           from these facts to what works and what does not
    report -> command   the table and the JSON; the exit code
"""
