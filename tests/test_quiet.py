"""What waits until it is asked for, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

_SCRIPT = """
import inspect
import sys
from visiontune.quiet import defer
defer()
inspect.getmodule(defer.__code__)  # looks at every module, as torch does at each of its operators
import scipy.stats
import scipy.stats as held
assert "scipy.stats._continuous_distns" not in sys.modules
from scipy import stats
assert held is stats and "scipy.stats._continuous_distns" not in sys.modules
assert abs(held.norm.cdf(0) - 0.5) < 1e-12
import scipy.stats
assert scipy.stats.norm is held.norm and sys.modules["scipy.stats"].norm is held.norm
defer()
assert sys.modules["scipy.stats"].norm is held.norm
try:
    held.nothing
except AttributeError:
    print("as it should")
"""


def test_a_deferred_module_is_loaded_when_something_in_it_is_asked_for():
    done = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True)
    assert done.stdout == "as it should\n", done.stderr
