"""One run: its config, execution and files.

run.py        model, data and training of a run; their options by name, hash and defaults
data.py       kinds of data, their config and tasks
options.py    parsing of options
execution.py  training of a run in its folder
records.py    files of a run
store.py      results folder of many runs
table.py      SQLite table of the runs of a results folder
passwords.py  masking of passwords in addresses of databases
"""
