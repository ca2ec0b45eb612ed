"""Benchmarks of speed and memory against `torch.nn.Linear` and published implementations, in interleaved rounds.

cases.py        cases (structure, size, tokens, pass), suites of cases, and the bytes that a case has to move
baselines.py    the published implementation, and tensorly-torch
variants.py     the implementations to compare for a case
check.py        the check of their outputs, without which no speed is reported
timing.py       interleaved timing
memory.py       peak memory of a training step
machine.py      the machine, and its peak speeds
run.py          measuring, case by case
results.py      results, their file, and changes between two benchmarks
mixtures.py     benchmark of mixtures of experts
projections.py  benchmark of projections
claims.py       the library's claims, judged by results
tables.py       results as tables
plot.py         results as a plot
fit_costs.py    fit of the dispatcher's cost model to results
"""
