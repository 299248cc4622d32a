"""What every op stands on: the choice of a backend, checks, plans and dispatch, coefficient tables, random numbers."""
