"""What an OpenRecon package is built from."""
