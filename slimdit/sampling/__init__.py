"""How noise becomes an image: the process, its randomness and the solvers."""
