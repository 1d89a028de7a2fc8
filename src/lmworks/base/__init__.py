"""What every layer may lean on: errors, files, optional imports, threads, shared types, reports."""
