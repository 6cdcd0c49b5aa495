"""``nemo-rao doctor``: what works on this machine, what does not, and why.

Nothing heavy is imported in the command's process, so that a broken package is reported like any other.

    inside              imports of packages, each run in a separate process
    probes              starts these and reports how each ended
    packages            versions, the plugin's requirements, and detection of packages named apex that are not NVIDIA's
    abilities           derives what works and what does not
    report -> command   the table and the JSON; the exit code
"""
