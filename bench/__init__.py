"""Benchmarks: this backend against what a user would run instead, and against the lower bound. `bench/README.md`."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, which measures memory, else writes lines of its own
