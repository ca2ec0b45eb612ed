"""Analysis of results folders: runs become comparisons, and comparisons become laws, multipliers, optima and maps."""
