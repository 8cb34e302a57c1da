"""What makes a map of a scan, the memory that it takes, and the patches that it runs in."""
