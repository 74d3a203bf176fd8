"""Copying a finished repository to the hub or to an object store, with what arrived compared afterwards."""
