"""The search for the structure of the lowest loss at a budget.

search.py     candidates one after another, each trained, until there are enough
space.py      the space: every admissible theta as a point of a cube, and families beside it
matching.py   width and rank for a budget
predictor.py  a guess of the loss from psi, nu, omega and sizes, and what it is worth
settings.py   what a search has settled, noted in its results folder
study.py      what is remembered: an Optuna study, and whose its trials are
leaders.py    the best that a search has found, and others at its compute
"""
