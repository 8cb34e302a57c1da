"""The same reconstruction for C and C++ hosts: the library's sources, and how it is built."""
