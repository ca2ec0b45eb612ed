"""The search for the structure with the lowest loss at a budget of compute.

config.py     SearchConfig and Optuna's samplers
search.py     Search: trains the models that the sampler proposes until there are enough trials
space.py      the search space: every admissible theta as a point of a cube, and other families
matching.py   width and rank for a budget
study.py      the Optuna study, and which driver its trials belong to
manifest.py   search.json in the results folder
leaders.py    the best structures of a search, and others at the same compute
"""
