"""What the Triton kernels of several ops share, beside what their C++ and CUDA share."""
