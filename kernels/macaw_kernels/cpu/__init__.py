"""Native CPU kernels: C++ behind a C interface, built on first use."""
