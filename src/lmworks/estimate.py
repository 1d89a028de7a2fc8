"""What a run will cost, before it starts: parameters, memory, disk by arithmetic; time by measuring a few steps."""
