"""The tunnel server: what listens, routes and forwards."""
