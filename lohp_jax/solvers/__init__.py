"""Classic solvers: `solver(family, problem, x0, num_steps, **options) -> Trace`, pure functions."""
