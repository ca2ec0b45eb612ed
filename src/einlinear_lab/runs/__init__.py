"""One run: what it is made of, doing it, and what is on disk of it.

options.py    options by name -> checked settings
models.py     the models, and what can be set about each
data.py       the data, and what can be set about it
run.py        a run: its model, data and training as flat options; their hash
check.py      what can be wrong with runs before they are trained
execute.py    one run in its folder
records.py    the files of a run
store.py      a results folder: many runs
passwords.py  what is not shown of a database's address
table.py      the table of all its runs
"""
