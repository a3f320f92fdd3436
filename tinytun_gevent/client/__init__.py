"""The tunnel client: what connects, dials the local service and reconnects."""
