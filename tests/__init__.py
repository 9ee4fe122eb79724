"""What holds for the tests and for every process that they start; set before torch is loaded."""

import os
import signal
from pathlib import Path

os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent.parent), os.getenv("PYTHONPATH")]))
# The networks are small: a second thread would wait more than it computes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell ignores these for what it starts in the background, and all that is started from there would ignore them too.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
