"""The shards of an index, divided among processes: one a device."""
