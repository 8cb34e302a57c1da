"""The authors' weights, read key by key without running anything in them."""
