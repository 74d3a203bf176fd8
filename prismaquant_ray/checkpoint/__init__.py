"""Reading, writing and verifying model repositories."""
