"""Runs, sweeps of them, and what they say: the machinery behind the command line (extra "experiments").

runs/      one run: a model, data and training as options by name, in a folder of its own
sweeps/    many runs, on this machine or a cluster; comparisons, the recipes of the literature
report/    one page that shows it
"""
