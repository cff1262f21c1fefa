"""Makes `toy` importable, here and in the processes that tests start."""

import os
import sys
from pathlib import Path

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[3]
sys.path.insert(0, str(HERE))
# The fork server of Python 3.11 preloads modules before it is told the path of its parent.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(HERE), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
)
