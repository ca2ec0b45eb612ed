"""Settings of all tests: the same draws on every machine, no deadline on a busy one."""

from hypothesis import settings

settings.register_profile("default", deadline=None, derandomize=True)
settings.load_profile("default")
