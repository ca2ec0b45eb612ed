"""Many runs: which they are, and doing those that are missing.

sweep.py        the runs that a file describes
driver.py       doing those that are missing
workers.py      on processes of this machine
cluster.py      on a Ray cluster
starting.py     processes that import nothing from the current folder
attempts.py     one run, on either
compare.py      structures side by side at matched compute
budget.py       the widest model within a budget of MACs
coord_check.py  how much a step moves the features, by width
recipes/        experiments of the literature
"""
