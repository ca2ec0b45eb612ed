"""The command line. `app.py` imports the module of the command that is called; the others share:

arguments.py  arguments and options
parsing.py    lists, NAME=VALUE and other texts
packages.py   required packages
importing.py  --import
running.py    runs of a command
display.py    messages, tables, progress bars
endings.py    errors and Ctrl-C
"""
