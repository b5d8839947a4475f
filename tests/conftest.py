"""One thread for each test process: tiny operations on several threads starve one another on a busy machine."""

from __future__ import annotations

import os
import signal

# Before torch is imported, which reads them once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
# Tests that are started in the background ignore Ctrl-C, which some of them are about.
signal.signal(signal.SIGINT, signal.default_int_handler)
