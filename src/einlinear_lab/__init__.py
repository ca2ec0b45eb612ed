"""The lab (extra "lab"): everything that trains, measures and draws. docs/architecture.md lists its folders."""
