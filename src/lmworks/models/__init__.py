"""The closed core: one config, one attention, one Transformer; families are tables."""
