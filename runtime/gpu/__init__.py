"""A network on a GPU, from the field in host memory or on the device to the map."""
