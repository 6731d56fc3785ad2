"""GPU profiles fitted to a user's own measurements."""
