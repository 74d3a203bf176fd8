"""Copying a finished repository to the hub or to an object store, and comparing it there."""
