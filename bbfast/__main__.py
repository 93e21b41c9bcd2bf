"""`python -m bbfast` is the command `bbfast`."""

import sys

from bbfast.cli import main

if __name__ == "__main__":
    sys.exit(main())
