"""How fast and how large layers really are: measured beside `torch.nn.Linear` and what others do, all in turns.

cases.py      what is measured: structures, sizes, tokens, passes; the suites
baselines.py  what ours is compared with: the implementation of the literature, tensorly-torch
variants.py   the ways to run a case
check.py      whether their results are right; no speed without that
timing.py     the clock
memory.py     peak memory of a training step
traffic.py    the bytes that a case has to move
machine.py    the machine, and the best it can do
mixtures.py   mixtures of experts, which have claims of their own
projections.py  projections beside the SVDs that they stand for
run.py        measuring, case by case
results.py    what was measured, and its file
claims.py     what the library promises, judged
changes.py    two runs compared
tables.py     all of it as tables
plot.py       and as one picture
fit_costs.py  the dispatcher's cost model, fitted to runs
"""
