"""Rewards for the responses of a file. Each module does one step; nothing is imported here.

    scorer      what a scorer is, a row as scorers see it, `NAME=KIND:ARGUMENT`
    source      the input's rows, and what must be right with them
    rule        a Python function                             -> rewards
    column      rewards that the file has                     -> rewards
    judge       a chat model and what it is asked             -> rewards
    judge_config  the file that describes it, judge.yaml
    chat        the interface of chat models                  -> answers
    endpoint    one behind HTTP: retries, concurrency (asynchronous)
    local_model   one in a folder, run here, in batches
    answers     answers on disk, so that nothing is asked twice
    reading     answer -> score, or why there is none
    notes       what is counted beside scores
    missing     responses without a score: counted, or too many
    statistics  distributions of columns, agreement with labels and with each other
    finish      part file -> standardised rewards -> the output and its statistics
    run         the command `nemo-rao score`

``judges/`` holds judges that a user's YAML file can be based on.
"""
