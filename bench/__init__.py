"""Benchmarks: this backend against what a user would run instead, and against the floor. `bench/README.md`."""
