"""`python -m lmworks` is `lmworks`."""

from __future__ import annotations

from lmworks.base.launch import end
from lmworks.cli import main

end(main())
