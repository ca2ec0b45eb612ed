"""What runs say, as numbers.

summary.py         runs -> studies of the same data, a curve per structure, a row per model
scaling/           scaling laws as mathematics
fit.py             the scaling laws of runs
learning_rates.py  the best learning rate of every model
wall_clock.py      how long training takes to a loss
coordinates.py     the coordinate check: how much a step moves the features, by width
updates.py         what it found, on disk
"""
