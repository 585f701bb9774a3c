"""The Triton backend: GPUs of NVIDIA and AMD; on CPU in Triton's interpreter (``TRITON_INTERPRET=1``), for tests."""
