"""`python -m clipgraft`."""

import sys

from clipgraft.cli import main

sys.exit(main())
