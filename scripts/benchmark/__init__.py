"""The modules of `scripts/bench`, from the inside out.

    task           one rank's work, as plain data
    workloads      models and their batches
    subjects       one training step in each engine
    worker         the process that builds an engine and answers requests
    worker_group   the worker processes of one engine, seen from the parent
    measure        check losses, then time in turns
    plan           what is measured, and in which sizes
    report         tables for a terminal and for the docs

Only the workers import torch, so that the parent stays small and idle.
"""
