"""A model repository for NVIDIA Triton, whose one model is the whole reconstruction."""
