"""Real runs beside simulated ones: logs read, replayed and compared."""
