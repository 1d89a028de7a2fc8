"""The verbs: each a whole run, from its options to its report."""
