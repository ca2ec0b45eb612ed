"""The command line: `app.py` imports the module of the command that is called."""
