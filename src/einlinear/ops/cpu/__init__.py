"""Compiled CPU kernel, in C++."""
