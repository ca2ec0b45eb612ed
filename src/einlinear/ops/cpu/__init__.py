"""Compiled CPU kernel: calls (cpu_backend.py), description of a structure (program.py), compilation (kernel_library.py), C++."""
