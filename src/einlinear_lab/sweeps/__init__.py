"""Sweeps: many runs, and the execution of those that are missing.

sweep.py        runs of a sweep file
compare.py      runs of a comparison of structures at matched compute
coord_check.py  coordinate check on real data
recipes/        experiments of papers
driver.py       execution of missing runs
workers.py      worker processes of this machine
cluster.py      workers on a Ray cluster
"""
