"""Command line and driver: one file a command."""
