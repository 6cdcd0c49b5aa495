"""Rows of text to micro-batches, one step per module. Nothing is imported here, so each module costs only its own
imports.

tokenizer   a directory or a name                     -> a tokenizer; ``tokens``: text -> token ids
template    a tokenizer's chat template               -> the text that it puts around messages and answers
rendering   a Row                                     -> text, by the template or unchanged (``content``: losses)
encode      a Row and a tokenizer                     -> Sample (exact prompt and response boundaries)
row_checks  a Row and the objective's requirements    -> the Row with the responses that are used (``choice``)
dataset     all Samples, checked (``sample_checks``)  -> PreferenceData and its LoadReport (``report``)
store       PreferenceData: flat arrays               <-> a directory, memory-mapped
cache       data that was loaded before               -> the same PreferenceData, without reading the files again
order       seed and step                             -> the sample indices of each micro-batch
collate     the Samples of a micro-batch              -> MicroBatch
prefetch    the next micro-batches, on a thread
"""
