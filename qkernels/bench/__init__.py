"""``qkernels bench``: the kernels and their rivals, timed side by side against this machine's measured limits."""
