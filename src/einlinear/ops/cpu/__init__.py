"""Compiled CPU kernel, in C++.

cpu_backend.py     calls of the kernel
program.py         a structure as the kernel reads it
kernel_library.py  compilation and cache
"""
