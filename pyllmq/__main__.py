"""`python -m pyllmq` is the command `pyllmq`."""

import sys

from .cli import main

sys.exit(main())
