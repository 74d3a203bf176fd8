"""Ray actors: core functions run where the data is."""
