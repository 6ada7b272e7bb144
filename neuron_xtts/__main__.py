"""``python -m neuron_xtts`` is the command ``neuron-xtts``."""

import sys

from neuron_xtts.tools.cli import main

if __name__ == "__main__":
    sys.exit(main())
