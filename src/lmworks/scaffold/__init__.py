"""A playground: a folder that stands alone, pinned to the installed version, with an example for each task."""
