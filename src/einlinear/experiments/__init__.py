"""Data, training and reports: the machinery behind the command line (extra "experiments")."""
