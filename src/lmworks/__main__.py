"""`python -m lmworks` is `lmworks`."""

from __future__ import annotations

import sys

from lmworks.cli import main

sys.exit(main())
