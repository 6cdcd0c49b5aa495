"""Files to rows of text. Nothing is left out silently. Nothing is imported here.

sources      files, globs, `datasets` names            -> records, each with its location
view         a record                                  -> its fields, and which of them have not been read
formats      a published data format                   -> a Row (``prompt``, ``responses``, ``pairs``, ``rewards``)
messages     chats in various notations                -> messages; ``transcripts``: dialogues stored as text
fields       typed fields, or an error with the location
reading      all of these, source after source         -> Row after Row
writing      a Row                                     -> a record that reads back equal
"""
