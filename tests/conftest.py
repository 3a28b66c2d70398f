"""Isolation of the tests: from the user's caches, and from each other where they run side by side."""

import os
import tempfile


# Before any library is imported: they read these once.
CACHE = tempfile.TemporaryDirectory(prefix="mocov3_hf_tests_")
os.environ["HF_HOME"] = CACHE.name
# Two test processes share two cores; more threads than cores only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
