"""What `scripts/bench` is made of, from the inside out.

    task        what one process is to do, as plain data
    workloads   the models and their batches
    subjects    one training step, as each subject would write it
    worker      the process that builds a subject and does as it is told
    crew        a subject's worker processes, seen from the outside
    measure     proofs first, then turns
    plan        what is measured, and in which sizes
    report      tables for a terminal and for the docs

Only the workers import torch: the process that asks them stays small and idle.
"""
