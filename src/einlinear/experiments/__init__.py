"""Data, training and reports: the machinery behind the command line (extra "experiments").

config.py       what can be set: names, defaults, presets and limits
data/           images, and batches of them
budget.py       the widest model within a budget of MACs
train.py        one run
store.py        a results folder
compare.py      structures side by side: which runs, and training what is missing
scaling/        laws, frontiers, multipliers and effects of the exponents, with intervals: pure functions of arrays
fit.py          power laws and compute multipliers of pairs of MACs and loss
summary.py      runs -> one row per structure and width
coordinates.py  the coordinate check
plots.py        the look of all figures
report.py       a results folder -> one self-contained page
"""
