"""Code that the kernels of several ops share, in C++, CUDA and Triton."""
