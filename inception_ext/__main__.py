"""``python -m inception_ext COMMAND``."""

import sys

from inception_ext.cli import main

if __name__ == "__main__":
    sys.exit(main())
