"""Rivals for the benchmarks: the same operators in Triton, imported only when one is timed."""
