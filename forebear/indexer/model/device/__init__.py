"""The device that models run on: which one, how it computes, and what happens when its memory does not suffice."""
