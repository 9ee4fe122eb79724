"""What holds for the tests and for every process that they start; set before torch is loaded."""

import os
from pathlib import Path

os.environ["PYTHONPATH"] = str(Path(__file__).parent.parent)
# The networks are small: a second thread would wait more than it computes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
