"""A compiled kernel for the CPU: its calls (executor), what it is told (program), how it is made (build), its code."""
