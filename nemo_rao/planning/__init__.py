"""Estimates for a run before it starts: memory of each rank, communication, FLOPs, and settings that fit.

Arithmetic only: neither torch nor an engine is imported. Networks are those of nemo_rao.config.families.

    network -> setting                        the planned run
    parameters -> buffers                     exact: tensors of a rank, Megatron's buffers, the optimizer's shards
    activations, log_probs -> memory          bytes at the peak of a step, by stage
    communication, compute                    bytes sent, FLOPs, pipeline bubble
    machine, links -> step_time -> whole_run  seconds of a step, hours of a run, at stated speeds
    advise -> report                          the nearest settings that fit; the table and the JSON
"""
