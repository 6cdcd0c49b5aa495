"""Rewards for the responses of a file. Each module does one step; nothing is imported here.

    scorer      the interface of scorers, input rows, `NAME=KIND:ARGUMENT`
    source      the input's rows and their checks
    rule        a Python function                             -> rewards
    column      rewards that the file has                     -> rewards
    judge       a chat model and its questions                -> rewards
    judge_config  the file that describes it, judge.yaml
    chat        the interface of chat models                  -> answers
    endpoint    a chat model behind HTTP: retries, concurrency (asynchronous)
    local_model   a chat model in a directory, run in this process, in batches
    answers     answers on disk, so that no question is asked twice
    reading     answer -> score, or the reason why there is none
    notes       counts reported along with scores
    missing     responses without a score: counting and limits
    statistics  distributions of columns, agreement with labels and between columns
    finish      part file -> standardized rewards -> the output and its statistics
    run         the command `nemo-rao score`

``judges/`` holds judges that a user's YAML file can extend.
"""
