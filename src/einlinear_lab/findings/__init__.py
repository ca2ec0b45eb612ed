"""What runs say, as numbers.

summary.py         runs -> studies of the same data, a curve per structure, a row per model
scaling/           scaling laws as mathematics
scaling_laws.py    the scaling laws of runs
learning_rates.py  the best learning rate of every model
wall_clock.py      how long training takes to a loss
taxonomy.py        what the exponents of the structures have to do with their losses
structure_map.py   where structures lie in (psi, nu, omega), and what each is worth
coord_check.py     what a coordinate check found, on disk: how much a step moves the features, by width
"""
