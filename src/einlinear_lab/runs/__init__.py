"""One run: its config, execution and files; and the results folder and table of many runs."""
