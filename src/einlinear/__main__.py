"""`python -m einlinear`: the installed command `einlinear`."""

import os
import sys
from importlib.metadata import entry_points

# Python puts the current folder first, where nothing is imported from, unless this library lies there
_HERE, _LIBRARY = os.getcwd(), os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if not getattr(sys.flags, "safe_path", False) and sys.path[0] == _HERE != _LIBRARY:
    del sys.path[0]

(_command,) = {*entry_points(group="console_scripts", name="einlinear")}
_command.load()()
