"""A compiled kernel for the CPU: its calls (backend), what it is told (program), how it is made (build), its code."""
