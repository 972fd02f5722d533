"""`python -m conjoin`: the same as the console script `conjoin`."""

import sys

from conjoin.cli import main

sys.exit(main())
