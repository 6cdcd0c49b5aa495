"""Inspection of data before training: rows as they are trained on, what is dropped and why, statistics.

    pieces      token ids                      -> pieces of text, each with its ids and its kind
    rows        what the loader made of a row  -> a row to be shown
    numbers     every row, while it is loaded  -> lengths, rewards and margins
    histogram   numbers                        -> bins with round limits
    settings    a recipe                       -> the keys that decide what a row becomes
    inspection  a recipe                       -> all of the above
    report      an inspection                  -> remarks and charts, for both ways to show them
    terminal    an inspection                  -> text, in color where it can be shown
    page        an inspection                  -> one HTML file (``charts``: SVG; ``style``: CSS)

Data is loaded by the code that training loads it with. No model and nothing of NeMo is imported.
"""
