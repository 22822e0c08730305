"""`python -m deformconv.cli`, where the command `deformconv` is not on the path."""

import sys

from deformconv.cli.main import main

sys.exit(main())
