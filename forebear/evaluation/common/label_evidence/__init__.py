"""Which label should a row of one label have? Estimates from what an index stores, and what they say together."""
