"""From rows of text to a micro-batch. Each module does one step; nothing is imported here, so that each costs only
its own imports.

tokenizer   a folder or a name                        -> a tokenizer; ``tokens``: text -> token ids
template    a tokenizer's chat template               -> what it puts around messages and answers
rendering   a Row                                     -> text, by the template or unchanged (``content``: losses)
encode      a Row and a tokenizer                     -> Sample (exact prompt and response boundaries)
row_checks  a Row and what an objective needs         -> the Row with the responses that are used (``choice``)
dataset     all Samples, checked (``sample_checks``)  -> PreferenceData and its LoadReport (``report``)
store       PreferenceData: flat arrays               <-> a folder, memory-mapped
cache       what was loaded before                    -> the same PreferenceData, without reading its files' rows
order       seed and step                             -> the numbers of the samples of each micro-batch
collate     the Samples of a micro-batch              -> MicroBatch
prefetch    the next micro-batches, on a thread
"""
