"""Stages 6 and 7: writing the repository of a plan, and verifying it as vLLM would read it."""
