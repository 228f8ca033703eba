"""`python -m diffsamp.cli`."""

import sys

from diffsamp.cli import main

if __name__ == "__main__":
    sys.exit(main())
