"""`python -m farpage`: the `farpage` command."""

import sys

from farpage.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
