"""Nothing of the user's own caches is read or written by the tests."""

import os
import tempfile


# Before any Hugging Face library is imported: they read it once.
CACHE = tempfile.TemporaryDirectory(prefix="mocov3_hf_tests_")
os.environ["HF_HOME"] = CACHE.name
