"""Python imports this as it starts, in the processes that tests start: their path has this folder too."""

import absent  # noqa: F401
