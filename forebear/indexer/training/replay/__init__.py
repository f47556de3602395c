"""A recorded run repeated, step by step, and differentiated; see the modules."""
