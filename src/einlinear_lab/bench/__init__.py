"""Benchmarks of speed and memory against `torch.nn.Linear` and published implementations, in interleaved rounds.

cases.py        cases (structure, size, tokens, pass), suites of cases, and the bytes that a case has to move
baselines.py    the published implementation, and tensorly-torch
variants.py     the implementations to compare for a case
timing.py, memory.py, machine.py    interleaved timing, peak memory, the machine and its peak speeds
run.py          checks of outputs and measurements, case by case
results.py      results, their file, and changes between two benchmarks
mixtures.py, projections.py    benchmarks of mixtures of experts, and of projections
claims.py       the library's claims, judged by results
tables.py, plot.py    results as tables, and as a plot
fit_costs.py    fit of the dispatcher's cost model to results
"""
