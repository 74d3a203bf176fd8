"""Where runs live: keys and bytes, artifacts and records."""
