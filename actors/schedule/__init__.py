"""The schedule of a run: units, what reads what, shards, who runs which, keys of the run store. No Ray, no clock."""
