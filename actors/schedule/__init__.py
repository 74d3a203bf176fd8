"""The schedule of a run: units, their dependencies, shards, their assignment, run store keys. No Ray, no clock."""
