"""The curvature of the mean training loss, its damping, and the solvers that invert it."""
