"""The command line, one file per command: call the pipeline, render its result."""
