"""The stages of a run as a library: typed results, events told to listeners, nothing printed."""
