"""The main job on real models: sizes, latency and answers before and after quantization.

`qkernels.demo.run.run_demo` is the whole; one file per model, and the pieces they share.
"""
