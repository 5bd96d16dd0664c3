"""Run the app as ``python -m m2m_bids``."""

import sys

from m2m_bids.cli.run import main

if __name__ == "__main__":
    sys.exit(main())
