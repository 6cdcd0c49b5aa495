"""From a file to a micro-batch. Each module does one step; nothing is imported here, so that each costs only itself.

    fields    typed fields of a record, or an error that names the place
    formats   one record of a published data set          -> Row
    rows      files, globs, `datasets` names              -> Row after Row
    tokenizer a folder or a name                          -> a tokenizer; ``tokens``: text -> token ids
    template  a tokenizer's chat template                 -> what it puts around messages and answers
    rendering a Row                                       -> text; ``content``: what of the row is not in it
    encode    a Row and a tokenizer                       -> Sample (exact prompt and response boundaries)
    dataset   all Samples, checked                        -> PreferenceData and its LoadReport
    store     PreferenceData: flat arrays                 <-> a folder, memory-mapped
    cache     what was loaded before                      -> the same PreferenceData, without reading its files' rows
    order     seed and step                               -> the numbers of the samples of each micro-batch
    collate   the Samples of a micro-batch                -> MicroBatch
    prefetch  the next micro-batches, on a thread

``synthetic`` and ``tokenizer_training`` make a small preference set and a tokenizer, so that every recipe can run
where there is neither data nor a model.
"""
