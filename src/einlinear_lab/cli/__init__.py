"""The command line: parses, calls, prints. Every command has a file of its name; `app.py` imports
the one that is called. What the commands share:

options.py    arguments and options
parsing.py    what is written as one argument: lists, NAME=VALUE
packages.py   the packages that they need
importing.py  code of the user's, for --import
running.py    doing the runs of a command
display.py    messages, tables, progress bars
endings.py    how they end early
"""
