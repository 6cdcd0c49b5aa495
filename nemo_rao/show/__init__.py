"""What a user looks at before the first training: rows as they are trained on, what is dropped and why, the numbers.

pieces      token ids                                -> pieces of text, each with its ids and its kind
rows        what the loader made of a row            -> a row to be shown
numbers     lengths, rewards and margins of all rows, collected while they are loaded
histogram   numbers                                  -> bins with round limits
inspection  a recipe                                 -> all of the above
terminal    an inspection                            -> text, in colour where it can be shown
page        an inspection                            -> one HTML file; ``charts`` and ``style`` are its parts
"""
