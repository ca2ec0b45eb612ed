"""Many runs: sweep files, comparisons, recipes of papers, and the execution of the runs that are missing."""
