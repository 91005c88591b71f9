"""The Triton kernels of EXL3, laid out as in transformers, whose door to them imports `kernels.triton` from here."""
