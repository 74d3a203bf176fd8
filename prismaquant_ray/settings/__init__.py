"""The sections of the configuration, one file a subject."""
