"""`python -m genfast.cli`, for launchers such as torchrun."""

import sys

from genfast.cli import main

sys.exit(main())
