"""Runs, sweeps of them, and what they say: the machinery behind the command line (extra "experiments").

run.py             a run: its model, data and training as flat options; their hash
options.py         options by name -> checked settings
models.py          the models, and what can be set about each
problems.py        the data, and what can be set about it
execute.py         one run in its folder
records.py         the files of a run
store.py           a results folder
table.py           the table of all its runs
sweep.py           which runs a file describes, and doing those that are missing
workers.py         runs on processes of this machine
cluster.py         runs on a cluster
recipes/           experiments of the literature, as sweeps
budget.py          the widest model within a budget of MACs
compare.py         structures side by side: which runs
coordinates.py     the coordinate check
updates.py         what it found, on disk
summary.py         runs -> studies of the same data, a curve per structure, a row per model
scaling/           scaling laws as mathematics
fit.py             the scaling laws of runs
learning_rates.py  the best learning rate of every model
plots.py           the look of all figures
report/            results folders -> one self-contained page
"""
