"""Pools that execute runs: processes of this machine, a Ray cluster, or turns in one process."""
