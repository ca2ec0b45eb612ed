"""The search for the structure with the lowest loss at a budget of compute; search.py is where to start reading."""
