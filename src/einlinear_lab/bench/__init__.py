"""Benchmarks of speed and memory against `torch.nn.Linear` and published implementations, in interleaved rounds."""
