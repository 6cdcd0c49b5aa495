"""From files to rows of text, of which nothing is left out in silence. Nothing is imported here.

sources      files, globs, `datasets` names            -> record after record, with its place
view         a record                                  -> its fields, and which of them nothing has taken
formats      a published shape of data                 -> a Row (``prompt``, ``responses``, ``pairs``, ``rewards``)
messages     chats in their several spellings          -> messages; ``transcripts``: text that holds a dialogue
fields       typed fields, or an error that names the place
reading      all of these, source after source         -> Row after Row
writing      a Row                                     -> a record that reads back equal
"""
