"""The operators' kernels for GPUs, in Triton.

None of them waits for the device, none has a size that depends on the data, and none reads beside a tensor,
whatever the coordinates are: a batch can be captured as one CUDA graph. Products and sums are fused where
`tl.fma` says so and nowhere else, so that every GPU, and Triton's interpreter, rounds alike.
"""
